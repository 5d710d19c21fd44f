"""The whole loop on two processes of two devices: one is killed, and nothing is lost."""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from agfsync_jax import backbones
from agfsync_jax.data.pairs import read_pairs
from agfsync_jax.parallel import watch
from agfsync_jax.training.checkpoints import restore_denoiser
from agfsync_jax.utils.metrics import read_metrics
from configs import micro
from tests.processes import ROOT, grouped

STEPS = 6


def start(workdir, envs):
    """`agfsync run` in processes; what they say goes to files beside the workdir."""
    command = [
        *(sys.executable, "-m", "agfsync_jax", "run", "--config=configs/micro.py:tiny"),
        *(f"--workdir={workdir}", f"--config.train.num_steps={STEPS}"),
        *("--config.train.save_every=2", "--config.train.tensorboard=false"),
        *("--config.prompts.num_prompts=4", "--config.sample.prompts_per_shard=2"),
        *("--config.sample.num_inference_steps=2", "--config.evaluate.num_prompts=4"),
    ]
    processes = []
    for index, env in enumerate(envs):
        log = workdir.parent / f"{workdir.name}-{index}.log"
        with log.open("a") as file:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file))
    return processes


def said(workdir, index):
    return (workdir.parent / f"{workdir.name}-{index}.log").read_text()


def steps(workdir):
    path = workdir / "round_000/checkpoints/metrics.jsonl"
    return [row["step"] for row in read_metrics(path)] if path.exists() else []


@pytest.mark.timeout(900)
def test_two_processes_lose_one_and_make_what_one_makes(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    processes = start(two, grouped())
    try:
        while len(steps(two)) < 3:
            assert [process.poll() for process in processes] == [None, None], said(two, 0)
            time.sleep(0.1)
        processes[1].kill()
        killed = time.monotonic()
        assert processes[0].wait(timeout=60) == watch.GONE
        assert time.monotonic() - killed < 60
        told = said(two, 0)
        assert "agfsync: error: process 1 of 2 (" in told and "is gone: nothing was heard" in told
        assert "the same command on all processes goes on from there" in told
        assert "Traceback" not in told

        processes = start(two, grouped())
        assert [process.wait(timeout=400) for process in processes] == [0, 0], said(two, 0)
    finally:
        for process in processes:
            process.kill()
    assert "train: skipped 2 of 6 steps already there" in said(two, 0)
    assert steps(two) == list(range(1, STEPS + 1))

    alone = {name: value for name, value in grouped(1)[0].items() if "JAX_P" not in name}
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"):
        del alone[name]
    (process,) = start(one, [alone | {"JAX_PLATFORMS": "cpu"}])
    assert process.wait(timeout=400) == 0, said(one, 0)

    fields = ("pair_id", "chosen_candidate", "rejected_candidate")
    pairs = [read_pairs(workdir / "round_000/pairs", fields) for workdir in (two, one)]
    for name in fields:
        np.testing.assert_array_equal(pairs[0][name], pairs[1][name])
    base = backbones.load(micro.get_config("tiny"), None, only=["unet"]).params["unet"]
    tuned = [restore_denoiser(w / "round_000/checkpoints", base, STEPS) for w in (two, one)]

    def difference(left, right):
        return max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), left, right)))

    assert difference(tuned[0], tuned[1]) < 1e-5 < difference(tuned[0], base)
    assert os.path.getsize(two / "report.html") > 10_000
