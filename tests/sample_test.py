"""The sample verb, with a tiny random Stable Diffusion."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from agfsync_jax import sample
from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.data import records
from agfsync_jax.data.images import decode_png
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.training.checkpoints import Checkpoints
from agfsync_jax.utils.clock import read_stages
from configs import micro
from tests import released_folders
from tests.processes import ROOT, run_processes

PROMPTS = {"p0": "red circle", "p1": "blue square", "p2": "circle", "p3": "red", "p4": "blue"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable_diffusion")
    released_folders.stable_diffusion(folder, "sd15")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    config = micro.get_config("tiny")
    config.backbone.path = str(folder)
    config.sample.update({"height": 8, "width": 8, "num_inference_steps": 2})
    config.sample.update({"num_candidates": 3, "prompts_per_shard": 2})
    return config


def start(workdir, round_index=0):
    rows = [{"id": i, "prompt": p, "category": "", "source": ""} for i, p in PROMPTS.items()]
    records.write_jsonl(workdir / f"round_{round_index:03d}" / "prompts.jsonl", rows)


def read(workdir, round_index=0):
    paths = sorted((workdir / f"round_{round_index:03d}" / "candidates").iterdir())
    rows = [r for path in paths for r in records.read_shard(path, records.CANDIDATE_FEATURES)]
    return [path.name for path in paths], rows


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("workdir")
    start(workdir)
    sample.main(config, workdir)
    return workdir


def test_candidates_of_every_prompt(workdir, config):
    names, rows = read(workdir)
    assert names == [f"0000{i}-of-00003.tfrecord" for i in range(3)]
    expected = [(prompt, candidate) for prompt in PROMPTS for candidate in range(3)]
    assert [(row["prompt_id"], row["candidate"]) for row in rows] == expected
    for row in rows:
        assert row["seed"] == row_seed(config.seed, 0, row["prompt_id"], row["candidate"])
        assert decode_png(row["image"]).shape == (8, 8, 3)
        assert row["latents"].shape == (8, 8, 4) and row["latents"].dtype == np.float16
    assert read_stages(workdir / "round_000" / "stages.json")["sample"]["items"] == 15


def test_only_candidates_after_the_first_are_perturbed(workdir, config, tmp_path):
    start(tmp_path)
    clean = config.copy_and_resolve_references()
    clean.sample.conditioning_noise = 0.0
    sample.main(clean, tmp_path)
    for noisy, without in zip(read(workdir)[1], read(tmp_path)[1], strict=True):
        distance = np.abs(noisy["latents"].astype(float) - without["latents"]).max()
        assert (distance > 0.01) == (noisy["candidate"] > 0)


def test_what_is_there_is_skipped_and_what_is_not_is_drawn_alike(workdir, config, capsys):
    folder = workdir / "round_000" / "candidates"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    kept, lost = "00000-of-00003.tfrecord", "00001-of-00003.tfrecord"
    (folder / lost).unlink()
    (folder / f"{lost}.aside").write_bytes(b"half a shard of a killed run")
    changed = (folder / kept).stat().st_mtime_ns
    sample.main(config, workdir)
    assert "skipped 2 of 3 shards" in capsys.readouterr().err
    assert (folder / kept).stat().st_mtime_ns == changed
    # Other rows shared its batch this time.
    assert (folder / lost).read_bytes() == before[lost]
    assert read(workdir)[0] == sorted(before)


def test_all_there_loads_no_model(workdir, config, capsys):
    other = config.copy_and_resolve_references()
    other.backbone.path = "no/such/folder"
    sample.main(other, workdir)
    assert "skipped 3 of 3 shards" in capsys.readouterr().err


def test_repair_draws_a_damaged_shard_anew(workdir, config):
    path = workdir / "round_000" / "candidates" / "00002-of-00003.tfrecord"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(records.RecordError):
        read(workdir)
    sample.main(config, workdir, repair=True)
    assert path.read_bytes() == whole


def test_a_later_round_draws_with_the_trained_denoiser(workdir, config, folder):
    unet = Backbone.load(folder).params["unet"]
    trained = jax.tree.map(lambda x: x * 1.2, unet)
    with Checkpoints(workdir / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(4, {"params": trained}, wait=True)
    start(workdir, 1)
    sample.main(config, workdir, round_index=1)
    first, second = read(workdir)[1], read(workdir, 1)[1]
    assert [row["seed"] for row in second] == [
        row_seed(config.seed, 1, row["prompt_id"], row["candidate"]) for row in first
    ]
    (workdir / "round_001" / "candidates" / "00000-of-00003.tfrecord").unlink()
    with Checkpoints(workdir / "round_000" / "checkpoints") as checkpoints:
        checkpoints.save(5, {"params": unet}, wait=True)
    with pytest.raises(ValueError, match=r"round_000/checkpoints \(step 4, now step 5\) changed"):
        sample.main(config, workdir, round_index=1)  # candidates of two models would be mixed
    sample.main(config, workdir, round_index=1, step="4")
    for again, row in zip(read(workdir, 1)[1], second, strict=True):
        np.testing.assert_array_equal(again["latents"], row["latents"])
    shutil.rmtree(workdir / "round_001" / "candidates")
    sample.main(config, workdir, round_index=1)
    assert np.abs(read(workdir, 1)[1][0]["latents"] - second[0]["latents"]).max() > 0.01


@pytest.mark.slow
def test_killed_ten_times_it_draws_the_same_bytes(tmp_path):
    """1,000 prompts of the micro suite, by the command line."""
    flags = ["--config=configs/micro.py", "--config.prompts.num_prompts=1000"]
    flags += ["--config.sample.num_inference_steps=2", "--config.sample.num_candidates=3"]
    flags += ["--config.sample.prompts_per_shard=10", "--config.sample.device_batch_size=64"]

    def command(verb, name):
        return [sys.executable, "-m", "agfsync_jax", verb, f"--workdir={tmp_path / name}", *flags]

    def drawn(name):
        folder = tmp_path / name / "round_000" / "candidates"
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tfrecord"))}

    for name in ("whole", "killed"):
        subprocess.run(command("prompts", name), cwd=ROOT, check=True)
    subprocess.run(command("sample", "whole"), cwd=ROOT, check=True)
    rng = np.random.default_rng(0)
    for kill in range(10):
        goal = len(drawn("killed")) + rng.integers(9)  # at once, or while it draws
        process = subprocess.Popen(command("sample", "killed"), cwd=ROOT)
        while len(drawn("killed")) < goal:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 2.0))
        assert process.poll() is None, "it was done before it was killed ten times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed {kill + 1} times, {len(drawn('killed'))} of 100 shards are whole")
    subprocess.run(command("sample", "killed"), cwd=ROOT, check=True)
    assert len(drawn("whole")) == 100
    assert drawn("killed") == drawn("whole")


TOGETHER = """
import json, sys
from pathlib import Path
from agfsync_jax.parallel import multihost
multihost.initialize()
from agfsync_jax import sample
from agfsync_jax.parallel import sharding
from ml_collections import ConfigDict
sharding._SMALL = 0
config, workdir = ConfigDict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
sample.main(config, workdir)
lost = workdir / "round_000/candidates" / sys.argv[3]
whole = lost.read_bytes()
multihost.barrier("whole")
if multihost.is_main():
    lost.unlink()
multihost.barrier("lost")
sample.main(config, workdir)  # though the other has less to do
print(json.dumps({"process": multihost.is_main(), "same": lost.read_bytes() == whole}))
"""


def test_two_processes_draw_what_one_draws(workdir, config, tmp_path):
    """With weights that are split over the devices of both."""
    config.mesh, config.sharding = {"data": 1, "fsdp": -1, "tensor": 1}, (("kernel$", "fsdp"),)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    start(tmp_path)
    names, rows = read(workdir)
    outs = run_processes(TOGETHER, tmp_path / "config.json", tmp_path, names[2])
    # What one of them has lost came back the same.
    assert outs == [{"process": True, "same": True}, {"process": False, "same": True}]
    assert read(tmp_path)[0] == names
    for ours, theirs in zip(read(tmp_path)[1], rows, strict=True):
        assert (ours["prompt_id"], ours["candidate"]) == (theirs["prompt_id"], theirs["candidate"])
        close = dict(rtol=1e-3, atol=1e-4)  # an ulp of float16
        np.testing.assert_allclose(ours["latents"], theirs["latents"], **close)


def test_what_was_chosen_and_what_was_cut_is_told(config, tmp_path, capsys):
    rows = [{"id": "long", "prompt": "red circle " * 40, "category": "", "source": ""}]
    records.write_jsonl(tmp_path / "round_000" / "prompts.jsonl", rows)
    sample.main(config, tmp_path)
    told = capsys.readouterr().err
    assert "sample: attention: chunked over queries" in told
    assert "sample: autoencoder in float32, as all else" in told
    assert "1 of 1 prompts are too long for the text encoder" in told


def test_what_is_missing_is_said(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="run `agfsync prompts` first"):
        sample.main(config, tmp_path)
    start(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="run `agfsync train` first"):
        sample.main(config, tmp_path, round_index=1)
    start(tmp_path)
    micro_model = {"backbone.path": "micro:stable-diffusion"}
    for changes, message in (
        (micro_model | {"sample.height": 30}, "30x8 pixels"),
        ({"sample.sampler": "magic"}, "'magic' is not in agfsync_jax/samplers"),
        ({"sample.num_candidates": 0}, "num_candidates=0"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict(changes)
        with pytest.raises(ValueError, match=message):
            sample.main(wrong, tmp_path)
