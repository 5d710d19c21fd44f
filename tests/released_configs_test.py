"""Every released config and variant, from a user's files to a model that diffusers draws with.

The command line is run as it is typed, with tiny twins of the released checkpoints: paths and sizes
alone are not those of the config. Some run each time, all of them with `-m "slow or not slow"`.
"""

import json

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file

from agfsync_jax import cli
from agfsync_jax.data import records
from agfsync_jax.data.images import decode_png
from agfsync_jax.data.pairs import read_pairs
from agfsync_jax.utils import configs
from tests import llm_server, released_folders
from tests.twins import blip2_folder
from tests.variants import RELEASED, VARIANTS

PEOPLE = [f"{spec} and people" for spec in RELEASED if spec.endswith(":dpo")]
# Each takes a minute of a core, of which most is tracing: one is in every run, and
# rehearsal_test runs sd15.
SOON = ("configs/sdxl.py:lora",)
SCHEDULERS = {"sd14": "PNDMScheduler", "sd15": "PNDMScheduler", "sd21": "DDIMScheduler"}
SCHEDULERS["sdxl"] = "EulerDiscreteScheduler"


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with twins of all that the released configs load, and what a user brings."""
    folder = tmp_path_factory.mktemp("released")
    for name in VARIANTS:
        unet = released_folders.stable_diffusion(folder / name, name)
        released_folders.lcm_lora(folder / f"{name}-lcm", unet)
    blip2_folder(folder / "blip2")
    released_folders.clip(folder / "clip")
    released_folders.aesthetic_head(folder / "head.pth")
    released_folders.user_files(folder)
    released_folders.people(folder / "people.parquet")
    return folder


def arguments(files, spec):
    """What is typed behind a verb: the config, and what a test can only have small."""
    spec, _, pairs = spec.partition(" and ")
    name, variants = spec.removeprefix("configs/").split(".py")
    values = {
        "backbone.path": files / name,
        "scorers.vqa.path": files / "blip2",
        "scorers.clip.path": files / "clip",
        "scorers.aesthetic.path": files / "clip",
        "scorers.aesthetic.head": files / "head.pth",
        "questions.path": files / "questions.jsonl",
        "evaluate.path": files / "heldout.jsonl",
        "sample.height": 8,
        "sample.width": 8,
        "train.num_steps": 2,
    }
    if pairs:
        values["pair.path"] = files / "people.parquet"
    else:
        values |= {"prompts.path": files / "prompts.jsonl", "prompts.num_prompts": 2}
    if "lcm" in variants:
        values["sample.lora"] = f"(({str(files / f'{name}-lcm')!r}, 1.0),)"
    if "dpo" in variants:
        values |= {"train.batch_size": 64, "train.warmup_steps": 1}
    return [f"--config={spec}", *(f"--config.{key}={value}" for key, value in values.items())]


def choices(workdir):
    """(chosen, rejected) candidate of each prompt by the scores: all three have equal say."""
    scores = {}
    for path in sorted((workdir / "round_000/scores").glob("0*.parquet")):
        for row in records.read_parquet(path):
            columns = [row[name] for name in ("vqa", "clip", "aesthetic")]
            scores.setdefault(row["prompt_id"], []).append(columns)
    for prompt, rows in scores.items():
        rows = np.array(rows, np.float64)
        spread = rows.std(axis=0)
        total = ((rows - rows.mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)).sum(axis=1)
        yield prompt, total.argmax(), total.argmin()


def check_pairs(workdir, pairs):
    folder = workdir / "round_000/pairs"
    if pairs:
        rows = read_pairs(folder, ["chosen_image", "rejected_image"])
        sides = zip(rows["chosen_image"], rows["rejected_image"], strict=True)
        assert [decode_png(a).mean() < decode_png(b).mean() for a, b in sides] == [True] * 5
        return
    names = ["prompt_id", "chosen_candidate", "rejected_candidate"]
    rows = read_pairs(folder, names)
    assert sorted(zip(*(rows[name] for name in names), strict=True)) == sorted(choices(workdir))


def check_report(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    (entry,) = summary["rounds"]
    for side in ("base", "tuned", "delta"):
        for metric in ("vqa", "clip", "aesthetic"):
            assert np.isfinite(entry[side][metric]["mean"]), (side, metric)
    assert (workdir / "report.html").stat().st_size > 10_000


def base_unet(files, name):
    """What training began with, as diffusers has it: {key: array}."""
    unused = dict.fromkeys(("safety_checker", "feature_extractor")) if name != "sdxl" else {}
    pipeline = DiffusionPipeline.from_pretrained(files / name, **unused)
    return {key: value.numpy() for key, value in pipeline.unet.state_dict().items()}


def check_export(files, spec, folder):
    """Base and tuned differ, and by as much as two steps can: nothing of the LoRA that draws
    candidates is in them, and the scheduler is the checkpoint's."""
    name, variants = spec.partition(" ")[0].removeprefix("configs/").split(".py")
    scheduler = SCHEDULERS[name]
    index = json.loads((folder / "model_index.json").read_text())
    written = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert index["scheduler"] == ["diffusers", scheduler]
    assert written["_class_name"] == scheduler
    tuned = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    base = base_unet(files, name)
    assert tuned.keys() == base.keys()
    moved = np.mean([np.abs(tuned[key] - base[key]).mean() for key in base])
    rate = 2048e-8 if "dpo" in variants else 1e-6
    assert 0.05 * rate < moved < 3 * rate  # Adam's first steps are as long as its learning rate


def case(spec):
    return pytest.param(spec, marks=() if spec in SOON else pytest.mark.slow, id=spec)


@pytest.mark.parametrize("spec", [*map(case, (*RELEASED, *PEOPLE))])
def test_all_verbs_of(spec, files, tmp_path):
    given = [*arguments(files, spec), f"--workdir={tmp_path}"]
    assert cli.main(["run", *given]) == 0
    check_report(tmp_path)
    check_pairs(tmp_path, "people" in spec)
    output = tmp_path / "out"
    given.append(f"--config.export.output={output}")
    if configs.load(given[0].removeprefix("--config="), {}).train.lora_rank:
        assert cli.main(["export", *given, "--config.export.lora=kohya", "--verify"]) == 0
        (file,) = output.glob("*.safetensors")
        up = [value for key, value in load_file(file).items() if key.endswith("lora_up.weight")]
        assert up and all(np.abs(value).max() > 1e-6 for value in up)
    else:
        assert cli.main(["export", *given, "--verify"]) == 0
        check_export(files, spec, output)


@pytest.mark.parametrize("name", [*map(case, VARIANTS)])
def test_plan_of(name, files, capsys):
    assert cli.main(["plan", *arguments(files, f"configs/{name}.py"), "--verb=all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [row["verb"] for row in rows] == ["sample", "score", "train"]
    assert all(row["bytes_per_chip"] > 0 for row in rows)


@pytest.mark.slow
def test_a_language_model_writes_all_that_a_released_config_needs(files, tmp_path):
    """No file of the user's: the command of the pages, with a server."""
    own = ("questions.path", "prompts.path", "evaluate.path")
    given = [
        each
        for each in arguments(files, "configs/sd15.py:")
        if not each.startswith(tuple(f"--config.{key}=" for key in own))
    ]
    given[0] = "--config=configs/sd15.py"
    given += ["--config.prompts.source=llm", "--config.questions.source=llm"]
    given += ["--config.prompts.embedder=", "--config.evaluate.num_prompts=2"]
    with llm_server.Server(llm_server.write) as server:
        urls = [f"--config.{block}.base_url={server.url}" for block in ("prompts", "questions")]
        assert cli.main(["run", *given, *urls, f"--workdir={tmp_path}"]) == 0
    check_report(tmp_path)
    check_pairs(tmp_path, "")
    held, trained = (
        records.read_jsonl(tmp_path / f"round_000/{name}.jsonl")
        for name in ("heldout/prompts", "prompts")
    )
    assert [row["source"] for row in held + trained] == ["llm"] * 4
