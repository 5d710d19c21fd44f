"""`agfsync score` with the shipped scorers: on one device, eight, and in two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from agfsync_jax import score
from agfsync_jax.data import images, records
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.questions import fixed_questions
from agfsync_jax.micro.scenes import sample_scenes
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import configs
from tests.processes import ROOT, run_processes

CONFIG = "configs/micro.py:tiny"
OVERRIDES = {"sample.prompts_per_shard": "2", "score.device_batch_size": "4"}
PROGRAM = """
import json, sys
from pathlib import Path
from agfsync_jax import score
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import configs
multihost.initialize()
score.main(configs.load(sys.argv[1], json.loads(sys.argv[2])), Path(sys.argv[3]))
print(json.dumps("done"))
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Candidates of six scenes in three shards, with their questions."""
    folder = tmp_path_factory.mktemp("drawn") / "round_000"
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 6)
    ids = [f"p{n}" for n in range(6)]
    records.write_jsonl(
        folder / "prompts.jsonl",
        [
            {"id": i, "prompt": scene.caption(), "category": "", "source": ""}
            for i, scene in zip(ids, scenes, strict=True)
        ],
    )
    asked = [
        {"id": i, "caption": scene.caption(), **row}
        for i, scene in zip(ids, scenes, strict=True)
        for row in fixed_questions(scene)
    ]
    records.write_jsonl(folder / "questions.jsonl", asked)
    for shard in range(3):
        rows = [
            {
                "prompt_id": ids[n],
                "candidate": candidate,
                "seed": 0,
                "image": images.encode_png(render(scenes[n], rng)),
                "latents": np.zeros((2, 2, 4), np.float16),
            }
            for n in (2 * shard, 2 * shard + 1)
            for candidate in range(3)
        ]
        path = folder / "candidates" / f"{records.shard_name(shard, 3)}.tfrecord"
        records.write_shard(path, rows, records.CANDIDATE_FEATURES)
    return folder.parent


def copy(drawn, workdir):
    for path in drawn.rglob("*"):
        if path.is_file():
            target = workdir / path.relative_to(drawn)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return workdir


def tables(workdir):
    folder = workdir / "round_000/scores"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def equal(first, second):
    """The same rows and answers; numbers but for their rounding."""
    names = sorted(path.name for path in (first / "round_000/scores").iterdir())
    assert len(names) == 6 and any(name.startswith("answers-") for name in names)
    assert names == sorted(path.name for path in (second / "round_000/scores").iterdir())
    for name in names:
        rows = [records.read_parquet(w / "round_000/scores" / name) for w in (first, second)]
        for one, other in zip(*rows, strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(value, other[key], rtol=1e-4, atol=1e-5)
                else:
                    assert value == other[key], key


def test_one_device_eight_and_two_processes_make_the_same_tables(drawn, tmp_path, monkeypatch):
    config = configs.load(CONFIG, OVERRIDES)
    eight = copy(drawn, tmp_path / "eight")
    score.main(config, eight)
    pair = copy(drawn, tmp_path / "pair")
    run_processes(PROGRAM, CONFIG, json.dumps(OVERRIDES), pair)
    equal(eight, pair)
    one = copy(drawn, tmp_path / "one")
    monkeypatch.setattr(
        score, "local_mesh", lambda spec: create_mesh(spec, devices=jax.devices()[:1])
    )
    score.main(config, one)
    equal(eight, one)

    # One shard is lost, as if the run had been killed: the same bytes come back.
    whole = tables(one)
    for name in ("00001-of-00003.parquet", "answers-00001-of-00003.parquet"):
        (one / "round_000/scores" / name).unlink()
    score.main(config, one)
    assert tables(one) == whole


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(drawn, tmp_path):
    """SIGKILL as soon as the first shard is there, and again for the second."""
    command = [sys.executable, "-c", PROGRAM, CONFIG, json.dumps(OVERRIDES)]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    whole, killed = copy(drawn, tmp_path / "whole"), copy(drawn, tmp_path / "killed")
    subprocess.run([*command, whole], check=True, cwd=ROOT, env=env)
    for count in (1, 2):
        process = subprocess.Popen([*command, killed], cwd=ROOT, env=env)
        folder = Path(killed) / "round_000/scores"
        while process.poll() is None and len(list(folder.glob("[0-9]*.parquet"))) < count:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, killed], check=True, cwd=ROOT, env=env)
    assert tables(killed) == tables(whole) and len(tables(whole)) == 6
