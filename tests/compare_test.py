"""`agfsync compare` on made-up workdirs: figures, pairing, and what cannot be compared."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from agfsync_jax import cli
from agfsync_jax.data import records
from agfsync_jax.evaluation.comparison import compare
from agfsync_jax.utils import configs
from agfsync_jax.utils.statistics import bootstrap
from tests.processes import ROOT

EVIL = '<script>x</script> & "cat"'
PROMPTS, SEEDS = 20, 2
BASE = np.random.default_rng(0).uniform(0.3, 0.7, (PROMPTS, SEEDS))
NOISE = np.random.default_rng(1).normal(0, 0.02, (3, PROMPTS, SEEDS))


def rows(scores):
    return [
        {"prompt_id": f"p{p}", "candidate": c, "vqa": float(x), "clip": 60 + 10 * float(x)}
        for (p, c), x in np.ndenumerate(scores)
    ]


def make(folder, tuned, *, base=BASE, prompt="prompt {}", steps=20, rounds=1, **overrides):
    """A workdir of an evaluated run: scores [prompts, seeds], and a learning curve a round."""
    text = {key.replace("__", "."): str(value) for key, value in overrides.items()}
    config = configs.load("configs/micro.py:tiny", text | {"rounds": str(rounds)})
    folder.mkdir(parents=True, exist_ok=True)
    public = configs.public(config.to_dict())
    (folder / "config.json").write_text(json.dumps(public, indent=2))
    (folder / "report.html").touch()
    for index in range(rounds):
        evals = folder / f"round_{index:03d}/evals"
        shown = [{"id": f"p{p}", "prompt": prompt.format(p)} for p in range(len(base))]
        records.write_jsonl(evals / "prompts.jsonl", shown)
        tables = {"base": rows(base), "tuned": rows(tuned)}
        means, comparison = compare(*tables.values())
        for name, result in (means | {"comparison": comparison}).items():
            (evals / f"{name}.json").write_text(json.dumps(result))
        for name, table in tables.items():
            records.write_parquet(evals / f"{name}-rows.parquet", table)
        curve = [curve_row(step, tuned.mean()) for step in range(1, steps + 1)]
        records.write_jsonl(evals.parent / "checkpoints/metrics.jsonl", curve)
    return folder


def curve_row(step, level):
    row = {"loss": 0.69 - 0.01 * step * level, "rewards/accuracy": 0.5 + 0.01 * step}
    row |= {"rewards/margin": level * step, "rewards/chosen": 1.0, "rewards/rejected": 0.0}
    return {"step": step, **row} | ({"validation/vqa": level + step / 99} if step % 5 == 0 else {})


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result(folder="."):
    return json.loads(open(f"{folder}/compare.json").read())


def test_three_seeds_and_another_rate(tmp_path, capsys):
    for seed in range(3):
        make(tmp_path / f"s{seed}", BASE + 0.05 + NOISE[seed], train__seed=seed)
    make(tmp_path / "rate", BASE - 0.1, train__learning_rate=1e-3, train__save_every=1, rounds=2)
    assert cli.main(["compare", "s0", "s1", "s2", "rate", "--output=out", "--against=s1"]) == 0
    found = result("out")
    assert found["reference"] == "s1"
    labels = [run["label"] for run in found["runs"]]
    assert labels[1] == "train.learning_rate=2e-05, train.save_every=2, train.seed=1"
    assert found["runs"][3]["differs"] == {
        "train.learning_rate": 1e-3,
        "train.save_every": 1,
        "train.seed": 0,
    }
    prompts = np.repeat([f"p{p}" for p in range(PROMPTS)], SEEDS)
    order = np.argsort([f"{p} {c}" for p in prompts[::SEEDS] for c in range(SEEDS)])
    for run, sign, seed in ((0, NOISE[0] - NOISE[1], 0), (2, NOISE[2] - NOISE[1], 2)):
        expected = bootstrap(sign.ravel()[order], prompts[order])
        for end, value in expected.items():
            assert found["runs"][run]["against"]["vqa"][end] == pytest.approx(value, abs=1e-12)
        assert found["runs"][run]["unpaired"] == "" and seed in (0, 2)
    worse = found["runs"][3]["against"]
    assert worse["vqa"]["mean"] == pytest.approx(-0.15 - NOISE[1].mean())
    assert worse["clip"]["mean"] == pytest.approx(10 * worse["vqa"]["mean"])
    assert found["runs"][1]["against"] == {}
    (group,) = found["groups"]
    means = [0.05 + noise.mean() for noise in NOISE]
    assert group["label"] == "3 seeds, train.learning_rate=2e-05, train.save_every=2"
    assert group["workdirs"] == ["s0", "s1", "s2"]
    assert group["delta"]["vqa"] == pytest.approx(
        {"mean": np.mean(means), "low": min(means), "high": max(means)}
    )
    assert group["tuned"]["vqa"]["mean"] == pytest.approx(BASE.mean() + np.mean(means))
    out = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(out) if line.startswith("vqa"))
    assert out[at].split() == ["vqa", *"tuned tuned - base win rate tuned - reference".split()]
    assert out[at + 2].endswith("reference") and "-0.1" in out[at + 4]
    assert out[at + 5].startswith("3 seeds, train.learning_rate=2e-05, train.save_every=2: mean [")
    page = (tmp_path / "out/compare.html").read_text()
    assert 'href="../s0/report.html"' in page and "validation/vqa" in page
    assert page.count("<svg") == 4 and "train.seed=2" in page
    # Round 1 follows round 0.
    assert cli.main(["compare", "rate"]) == 0
    assert re.search(r">40</text>|<!-- 40 -->", (tmp_path / "compare.html").read_text())


def test_what_cannot_be_paired(tmp_path, capsys):
    make(tmp_path / "one", BASE + 0.1)
    make(tmp_path / "other prompts", BASE + 0.1, prompt="another {}", seed=1)
    make(tmp_path / "fewer", BASE[:, :1] + 0.1, base=BASE[:, :1], evaluate__num_seeds=2)
    make(tmp_path / "seed", BASE[::-1] + 0.1, base=BASE[::-1], seed=2)
    rounded = BASE + np.where(np.arange(SEEDS) % 2, 1, -1) * 1e-3  # another machine's
    make(tmp_path / "machine", rounded + 0.2, base=rounded, train__seed=1)
    folders = ["one", "other prompts", "fewer", "seed", "machine"]
    assert cli.main(["compare", *folders]) == 0
    found = {run["workdir"]: run for run in result()["runs"]}
    assert found["other prompts"]["unpaired"] == "judged on other prompts"
    assert found["fewer"]["unpaired"] == "judged on another number of images"
    assert found["seed"]["unpaired"] == "other scores of the base: vqa, clip"
    assert all(not found[name]["against"] for name in ("other prompts", "fewer", "seed"))
    assert found["machine"]["against"]["vqa"]["mean"] == pytest.approx(0.1)
    assert capsys.readouterr().out.count("is not compared with the reference: ") == 3
    assert "judged on other prompts" in (tmp_path / "compare.html").read_text()


def test_one_scorer_of_the_base_differs(tmp_path):
    make(tmp_path / "one", BASE + 0.1)
    other = make(tmp_path / "two", BASE + 0.1, scorers__clip__dtype="bfloat16")
    for name in ("base", "tuned"):
        path = other / f"round_000/evals/{name}-rows.parquet"
        table = [row | {"clip": 99 - row["clip"]} for row in records.read_parquet(path)]
        records.write_parquet(path, table)
    assert cli.main(["compare", "one", "two"]) == 0
    run = result()["runs"][1]
    assert list(run["against"]) == ["vqa"] and run["unpaired"] == "other scores of the base: clip"


def test_what_people_wrote_is_escaped(tmp_path):
    make(tmp_path / "one", BASE + 0.1, train__start=EVIL)
    make(tmp_path / "two", BASE + 0.1, train__start="x" * 99)
    assert cli.main(["compare", "one", "two"]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"url\(|@import|https?://(?!www.w3.org/)", page)
    assert result()["runs"][1]["label"] == f"train.start=…{'x' * 31}"


def test_runs_that_are_alike_are_named_by_their_folders(tmp_path):
    make(tmp_path / "a/one", BASE + 0.1)
    make(tmp_path / "b/two", BASE + 0.1, mesh__data=2)
    assert cli.main(["compare", "a/one", "b/two", "a/../a/one"]) == 0
    assert [run["label"] for run in result()["runs"]] == ["one", "two"]
    assert result()["groups"][0]["label"] == "2 seeds"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "agfsync compare needs workdirs"),
        (["good", "none"], "none is no workdir (no config.json): `agfsync run --config=... --work"),
        (["good", "begun"], "no round_000 in begun; `agfsync run`"),
        (["good", "unjudged"], "unjudged is unfinished: `agfsync run --config=... --workdir=unju"),
        (["good", "half"], "half is unfinished: `agfsync run"),
        (["good", "json"], "json/round_000/evals/comparison.json is damaged"),
        (["good", "rows"], "rows/round_000/evals/tuned-rows.parquet is damaged"),
        (["good", "log"], "log is damaged: checkpoints/metrics.jsonl"),
        (["good", "--config=configs/micro.py"], "unknown argument '--config=configs/micro.py'"),
        (["good", "--against=none"], "none is no workdir"),
    ],
)
def test_mistakes(args, message, tmp_path, capsys):
    make(tmp_path / "good", BASE)
    if "begun" in args:
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun/config.json").write_text((tmp_path / "good/config.json").read_text())
    for name in set(args) & {"unjudged", "half", "json", "rows", "log"}:
        folder = make(tmp_path / name, BASE) / "round_000"
        if name == "unjudged":
            (folder / "evals/comparison.json").unlink()
        if name == "half":
            path = tmp_path / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rounds": 2}))
        if name == "json":
            (folder / "evals/comparison.json").write_text("{")
        if name == "rows":
            path = folder / "evals/tuned-rows.parquet"
            path.write_bytes(path.read_bytes()[:-9])
        if name == "log":
            (folder / "checkpoints/metrics.jsonl").write_text('{"step"\n')
    assert cli.main(["compare", *args]) == 2
    told = capsys.readouterr().err
    assert told.startswith("agfsync: error: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "compare.html").exists()


def test_no_device_is_used(tmp_path):
    make(tmp_path / "one", BASE)
    code = "import sys; from agfsync_jax import cli; assert cli.main(['compare', 'one']) == 0\n"
    code += "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("False"), done.stderr
