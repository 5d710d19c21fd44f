"""The micro loop gains, and its controls do not: hours on 2 cores, run by hand (see README.md).

One workdir draws and scores the candidates and the base model; each variant pairs, trains and
evaluates from a copy of it. The figures go to loop_figures.json in the folder of --basetemp.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax import cli
from agfsync_jax.data import images, records
from agfsync_jax.micro import referee
from agfsync_jax.micro.grammar import parse_caption

pytestmark = pytest.mark.slow

VARIANTS = {
    "seed 0": {"train.seed": 0},
    "seed 1": {"train.seed": 1},
    "seed 2": {"train.seed": 2},
    "LoRA": {"train.lora_rank": 8, "train.learning_rate": 4e-4},
    "shuffled": {"pair.shuffle_labels": True},
    "referee": {},  # see score_by_referee
    "sft": {"loss.name": "sft"},
    "all timesteps": {"train.timesteps": ""},
}


def agfsync(verb, workdir, changes):
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    assert cli.main([verb, "--config=configs/micro.py", f"--workdir={workdir}", *flags]) == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A workdir with scored candidates."""
    workdir = tmp_path_factory.mktemp("loop") / "shared"
    for verb in ("prompts", "questions", "sample", "score"):
        agfsync(verb, workdir, {})
    return workdir


def score_by_referee(round_dir: Path) -> None:
    """Puts the referee's mean into the column that makes the pairs: a perfect reward."""
    prompts = {row["id"]: row["prompt"] for row in records.read_jsonl(round_dir / "prompts.jsonl")}
    for path in sorted((round_dir / "candidates").glob("*.tfrecord")):
        scores = round_dir / "scores" / f"{path.stem}.parquet"
        rows = {(row["prompt_id"], row["candidate"]): row for row in records.read_parquet(scores)}
        for drawn in records.read_shard(path, records.CANDIDATE_FEATURES):
            scene = parse_caption(prompts[drawn["prompt_id"]])
            checks = referee.judge(images.decode_png(drawn["image"]), scene)
            row = rows[drawn["prompt_id"], drawn["candidate"]]
            row |= {"vqa": referee.mean(checks), "clip": 0.0, "aesthetic": 0.0}
        records.write_parquet(scores, list(rows.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(shared, variant):
    workdir = shared.with_name(variant.replace(" ", "_"))
    for part in ("prompts.jsonl", "questions.jsonl", "candidates", "scores"):
        source, target = shared / "round_000" / part, workdir / "round_000" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    base = shared.with_name("base")  # the first variant draws the base model for all
    if base.exists():
        shutil.copytree(base, workdir / "round_000" / "evals" / "base")
    if variant == "referee":
        score_by_referee(workdir / "round_000")
    for verb in ("pair", "train", "evaluate"):
        agfsync(verb, workdir, VARIANTS[variant])
    if not base.exists():
        shutil.copytree(workdir / "round_000" / "evals" / "base", base)

    evals = workdir / "round_000" / "evals"
    delta = json.loads((evals / "comparison.json").read_text())["delta"]
    figures = shared.with_name("loop_figures.json")
    known = json.loads(figures.read_text()) if figures.exists() else {}
    known[variant] = {key: value for key, value in delta.items() if "/" not in key}
    figures.write_text(json.dumps(known, indent=2))
    print(variant, json.dumps(known[variant]))

    num_prompts = len(records.read_jsonl(evals / "prompts.jsonl"))
    assert num_prompts >= 300
    if variant.startswith("seed"):
        assert delta["referee"]["low"] > 0
        assert delta["referee_strict"]["low"] >= 0.15
        assert delta["vqa"]["mean"] > 0
        assert delta["aesthetic"]["high"] >= 0
    elif variant == "shuffled":
        assert delta["referee"]["low"] <= 0
    elif variant == "referee":
        assert delta["referee"]["low"] > 0
    assert all(np.isfinite(value["mean"]) for value in delta.values())
