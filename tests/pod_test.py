"""The whole loop on two processes of two devices: one is killed, and nothing is lost."""

import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from agfsync_jax.backbones.stable_diffusion import Backbone as StableDiffusion
from agfsync_jax.data.pairs import read_pairs
from agfsync_jax.parallel import watch
from agfsync_jax.training.checkpoints import restore_denoiser
from agfsync_jax.utils.metrics import read_metrics
from tests import released_folders
from tests.processes import ROOT, grouped

STEPS = 12


# What asks no questions is quick to compile; score_devices_test has the others on two processes.
CONFIG = """
from configs import micro


def get_config():
    c = micro.get_config("tiny")
    c.backbone.path = "{model}"
    c.sample.height = c.sample.width = 8
    del c.scorers.vqa, c.pair.weights.vqa
    c.pair.min_margin = 0.0
    c.train.num_steps, c.train.save_every, c.train.tensorboard = {steps}, 2, False
    c.evaluate.evaluators = ()  # the referee knows the world alone
    return c
"""


def start(workdir, envs):
    """`agfsync run` in processes; what they say goes to files beside the workdir."""
    config = workdir.parent / "config.py"
    config.write_text(CONFIG.format(model=workdir.parent / "tiny", steps=STEPS))
    command = [
        *(sys.executable, "-m", "agfsync_jax", "run"),
        *(f"--config={config}", f"--workdir={workdir}"),
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
    released_folders.stable_diffusion(tmp_path / "tiny", "sd15")
    processes = start(two, grouped())
    try:
        saved = two / "round_000/checkpoints/2"
        while len(steps(two)) < 3 or not saved.exists():  # it is there once it is whole
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
    skipped = re.search(rf"train: skipped (\d+) of {STEPS} steps already there", said(two, 0))
    assert 2 <= int(skipped[1]) < STEPS
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
    base = StableDiffusion.load(tmp_path / "tiny", only=["unet"]).params["unet"]
    tuned = [restore_denoiser([(w / "round_000/checkpoints", STEPS)], base) for w in (two, one)]

    def difference(left, right):
        return max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), left, right)))

    assert difference(tuned[0], tuned[1]) < 1e-5 < difference(tuned[0], base)
    assert os.path.getsize(two / "report.html") > 10_000
