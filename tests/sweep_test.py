"""`agfsync sweep` by the command line: trainings that share candidates, and what cannot be."""

import json
import shlex
import signal
from types import SimpleNamespace

import pytest

from agfsync_jax import backbones, checks, cli, compare, prompts, run, sample, sweep, train
from agfsync_jax.data import records
from agfsync_jax.data.columns import Column
from agfsync_jax.scorers import Scorer
from agfsync_jax.utils import configs, modules
from agfsync_jax.utils.files import read_json
from tests.tiny_backbone import DrawingBackbone

FILE = """
from configs import micro


def get_config(arg=None):
    c = micro.get_config("tiny")
    c.scorers = {"light": {"name": "light"}}
    c.pair.update({"min_margin": 0.0, "min_questions": 0, "strategy": "best_worst"})
    c.pair.weights, c.pair.images = {"light": 1.0}, False
    c.prompts.num_prompts = c.evaluate.num_prompts = 4
    c.evaluate.update({"num_seeds": 1, "evaluators": ()})
    c.sample.update({"num_inference_steps": 1, "guidance_scale": 1.0})
    c.sample.update({"num_candidates": 2, "prompts_per_shard": 4})
    c.train.update({"num_steps": 1, "save_every": 1, "warmup_steps": 0})
    return c


def sweep():
"""
TWO = """
    for beta in (1000.0, 4000.0):
        yield {"loss.beta": beta}
"""


class Light(Scorer):
    """Brightness."""

    columns = {"light": Column()}

    def __init__(self, mesh=None, *, batch_size=1):
        pass

    def __call__(self, images, prompts, questions):
        return {"light": images.mean((1, 2, 3))}


@pytest.fixture(scope="module", autouse=True)
def quick_models():
    """Models that compile in a second, whose sizes nothing knows beforehand."""
    load, fake = modules.load, SimpleNamespace(Scorer=Light)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGFSYNC_CACHE", "")
        patch.setattr(checks, "room", lambda *_: [])
        patch.setattr(backbones, "backbone_class", lambda config: DrawingBackbone)
        patch.setattr(
            modules, "load", lambda room, name: fake if room == "scorers" else load(room, name)
        )
        yield
    signal.signal(signal.SIGTERM, before)


def write(folder, body):
    path = folder / "mine.py"
    path.write_text(FILE + body)
    return path


def command(path, *more):
    return ["sweep", f"--config={path}", f"--workdir={path.parent / 'runs'}", *more]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The config of a sweep of two betas, beside what it left."""
    path = write(tmp_path_factory.mktemp("swept"), TWO)
    assert cli.main(command(path)) == 0
    return path


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_candidates_are_drawn_once(swept):
    folder = swept.parent / "runs"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "shared",
        "loss.beta=1000.0",
        "loss.beta=4000.0",
    }
    drawn = [path.relative_to(folder).as_posix() for path in folder.rglob("candidates")]
    assert drawn == ["shared/round_000/candidates"]
    first, second = (files_of(folder / f"loss.beta={b}/round_000/evals/base") for b in (1e3, 4e3))
    assert first == second and len(first) >= 2
    times = [read_json(folder / f"loss.beta={b}/round_000/stages.json") for b in (1e3, 4e3)]
    # 4 images of each model, and the second run has those of the base.
    assert [each["evaluate"]["items"] for each in times] == [8, 4]
    for beta in (1000.0, 4000.0):
        config = read_json(folder / f"loss.beta={beta}" / "config.json")
        assert config["loss"]["diffusion_dpo"]["beta"] == beta
        assert config["pair"]["path"] == str(folder / "shared/round_000")
        (row,) = records.read_parquet(folder / "shared/round_000/scores/00000-of-00001.parquet")[:1]
        assert set(row) == {"prompt_id", "candidate", "light"}
    found = json.loads((folder / "compare.json").read_text())
    assert [each["label"] for each in found["runs"]] == [
        "loss.diffusion_dpo.beta=1000.0",
        "loss.diffusion_dpo.beta=4000.0",
    ]
    assert "light" in found["runs"][1]["against"] and not found["runs"][1]["unpaired"]
    assert "pairs.html" in (folder / "loss.beta=1000.0/report.html").read_text()


def test_what_is_done_is_not_done_again(swept, monkeypatch, capsys):
    before = files_of(swept.parent)

    def fail(*_, **__):
        raise AssertionError("a run began")

    monkeypatch.setattr(run, "main", fail)
    monkeypatch.setattr(run, "go_through", fail)
    assert cli.main(command(swept)) == 0
    said = capsys.readouterr()
    assert said.err.count(" is done\n") == 2
    assert "light" in said.out and "loss.diffusion_dpo.beta=4000.0" in said.out
    assert files_of(swept.parent) == before


def test_the_commands_that_are_printed_are_the_same_runs(swept, tmp_path, capsys):
    (tmp_path / "a folder").mkdir()
    path = write(tmp_path / "a folder", TWO)
    assert cli.main(command(path, "--config.train.seed=3", "--dry-run")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (path.parent / "runs").exists()
    verbs = [line.split()[1] for line in lines]
    assert verbs == ["prompts", "questions", "sample", "score", "run", "run"]
    assert cli.main(command(path, "--config.train.seed=3", "--dry_run", "--index=1")) == 0
    assert capsys.readouterr().out.splitlines() == lines[5:]
    for line in lines[:4]:
        word, *argv = shlex.split(line)
        assert word == "agfsync" and cli.main(argv) == 0
    assert cli.main(shlex.split(lines[4])[1:]) == 0
    made = files_of(path.parent / "runs/loss.beta=1000.0")
    # The sweep finds all of it and does the rest.
    sweep_again = command(path, "--config.train.seed=3")
    capsys.readouterr()
    assert cli.main([*sweep_again, "--index=0"]) == 0
    assert f"{path.parent / 'runs/loss.beta=1000.0'} is done" in capsys.readouterr().err
    assert made.items() <= files_of(path.parent / "runs/loss.beta=1000.0").items()
    # Candidates and pairs are those of the other sweep, which differs in what trains alone.
    for name in ("shared/round_000/candidates", "loss.beta=1000.0/round_000/pairs"):
        ours, theirs = (files_of(each.parent / "runs" / name) for each in (path, swept))
        assert {k: v for k, v in ours.items() if k.suffix != ".md"} == {
            k: v for k, v in theirs.items() if k.suffix != ".md"
        }


def test_tasks_that_start_together(swept, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, TWO)
    assert cli.main(command(path, "--index=1")) == 2
    told = capsys.readouterr().err
    assert "run `agfsync sample` first" in told and "--index=shared" in told
    assert told.startswith("agfsync: error: ") and told.count("\n") == 1
    ran = []
    monkeypatch.setattr(run, "go_through", lambda verbs, *_, **__: ran.append(len(verbs)))
    monkeypatch.setattr(run, "main", lambda config, workdir, **_: ran.append(workdir.name))
    assert cli.main(command(path, "--index=shared")) == 0 and ran == [4]
    shared = tmp_path / "runs/shared"
    (shared / "round_000").symlink_to(swept.parent / "runs/shared/round_000")
    assert cli.main(command(path, "--index=1")) == 0 and ran == [4, "loss.beta=4000.0"]
    assert cli.main(command(path, "--index=2")) == 2
    assert "--index=2: expected shared, or a number, 0 to 1" in capsys.readouterr().err


def test_a_training_that_diverges_is_left_alone(swept, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, TWO)
    ran, compared = [], []

    def main(config, workdir, **_):
        ran.append(workdir.name)
        if len(ran) == 1:
            raise FloatingPointError("step 7: the loss is nan")
        (workdir / "round_000/evals").mkdir(parents=True)
        (workdir / "round_000/evals/comparison.json").write_text("{}")
        (workdir / "report.html").touch()

    monkeypatch.setattr(run, "main", main)
    monkeypatch.setattr(run, "go_through", lambda *_, **__: None)
    monkeypatch.setattr(compare, "main", lambda *_, **flags: compared.append(flags))
    assert cli.main(command(path)) == 2
    assert ran == ["loss.beta=1000.0", "loss.beta=4000.0"]
    assert compared == [
        {"workdirs": [f"{tmp_path}/runs/loss.beta=4000.0"], "output": f"{tmp_path}/runs"}
    ]
    assert "loss.beta=1000.0: step 7: the loss is nan" in capsys.readouterr().err


def parts(tmp_path, body, overrides=None):
    path, overrides = write(tmp_path, body), overrides or {}
    return sweep.plan(str(path), overrides, configs.sweep(str(path)), tmp_path / "runs")


def test_what_is_shared(tmp_path):
    found = parts(
        tmp_path,
        """
    yield {"train.seed": 1}
    yield {"sample.guidance_scale": 2.0, "pair.normalize": "rank"}
    yield {"train.seed": 2, "sample.device_batch_size": 3}
    yield {"sample.guidance_scale": 2.0, "loss.name": "ipo", "loss.beta": 0.1}
    yield {"rounds": 2}
    yield {"pair.path": "people"}
    yield {"seed": 1}
    yield {}
""",
    )
    names = [part.shared.workdir.name if part.shared else None for part in found]
    assert names == ["shared", "shared-2", "shared", "shared-2", None, None, "shared-3", "shared"]
    assert [part.config.pair.path.rpartition("runs/")[2] for part in found] == [
        *("shared/round_000", "shared-2/round_000", "shared/round_000", "shared-2/round_000"),
        *("", "people", "shared-3/round_000", "shared/round_000"),
    ]
    assert found[1].shared.overrides == {"sample.guidance_scale": "2.0"}
    assert found[3].config.loss.ipo.beta == 0.1 and found[-1].workdir.name == "unchanged"
    assert found[3].workdir.name == "sample.guidance_scale=2.0,loss.name=ipo,loss.beta=0.1"


def test_whose_base_images_are_the_same(tmp_path):
    found = parts(
        tmp_path,
        """
    yield {}
    yield {"train.seed": 1, "pair.normalize": "rank", "score.device_batch_size": 2}
    yield {"loss.name": "ipo"}
    yield {"evaluate.num_seeds": 3}
    yield {"evaluate.split": "test"}
    yield {"sample.guidance_scale": 2.0}
    yield {"seed": 1}
""",
    )
    same = [sweep.same_base(found[0], part) for part in found]
    assert same == [True, True, True, False, False, False, False]


def test_names_are_those_of_folders():
    assert sweep.name_of({"train.timesteps": "0:200"}).startswith("train.timesteps=0_200-")
    long, other = ({"train.start": f"{'a/' * 200}{n}"} for n in range(2))
    assert len(sweep.name_of(long)) < 130 and sweep.name_of(long) != sweep.name_of(other)
    for text in ("../..", "a b", "<&>", "\n", "x" * 300, "ünï"):
        name = sweep.name_of({"train.start": text})
        assert name.startswith("train.start=") and not set(name) & set("/ <>&\nü")


@pytest.mark.parametrize(
    ("body", "flags", "message"),
    [
        ("    yield {'train.sed': 1}", [], "sweep() yields {'train.sed': '1'}: --config.train.sed"),
        ("    yield {'train.seed': 0.5}", [], "--config.train.seed=0.5: expected a whole number"),
        ("    yield {'train': 1}", [], "--config.train is a block"),
        ("    yield {'train.lora_rank': -1}", [], "run train.lora_rank=-1: config.train.lora_rank"),
        ("    yield {'loss.name': 'best'}", [], "'best' is not in agfsync_jax/losses"),
        ("    yield {'prompts.num_prompts': 10**9}", [], "config.prompts: "),
        ("    yield {'backbone.path': './no'}", [], "run backbone.path=._no"),
        ("    yield from ()", [], "yields no run"),
        ("    yield 3", [], "yields 3, expected the overrides"),
        ("    yield {3: 4}", [], "yields {3: 4}, expected the overrides"),
        ("    return None", [], "yields no run"),
        ("    return None\ndef sweep(arg, more): ...", [], "has no sweep(), which says the runs"),
        ("    yield {'seed': 1 / 0}", [], "ZeroDivisionError"),
        (
            "    yield {'train.seed': 0}\n    yield {}",
            [],
            "the same run twice, by {'train.seed': '0'} and by {}",
        ),
        ("    yield {'seed': 1}\n    yield {'seed': 1}", [], "the same run twice"),
        ("    yield {'seed': 1}", ["--config.seed=2"], "--config.seed: sweep() sets it"),
        ("    yield {'seed': 1}", ["--round=1"], "--round=1: a sweep goes through all rounds"),
        ("    yield {'seed': 1}\nsweep = None", [], "has no sweep(), which says the runs"),
    ],
)
def test_mistakes_are_told_before_any_run(body, flags, message, tmp_path, monkeypatch, capsys):
    for module in (prompts, sample, train):
        monkeypatch.setattr(module, "main", lambda *_, **__: pytest.fail("a verb began"))
    good = "    yield {'train.seed': 7}\n" if "yield {'" in body else ""  # which must not begin
    path = write(tmp_path, good + body + "\n")
    assert cli.main(command(path, *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith("agfsync: error: ") and message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_workdir_of_another_config_is_told_before_any_run(swept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "main", lambda *_, **__: pytest.fail("a run began"))
    changed = swept.with_name("changed.py")
    changed.write_text(swept.read_text().replace('num_steps": 1', 'num_steps": 2'))
    args = ["sweep", f"--config={changed}", f"--workdir={swept.parent / 'runs'}", "--repair"]
    assert cli.main(args) == 2
    told = capsys.readouterr().err
    assert "run loss.beta=1000.0: " in told and "train.num_steps: 1 there, 2 now" in told
