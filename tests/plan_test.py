"""Plan: what it prints for the devices that are here, and for a TPU where libtpu is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from agfsync_jax import plan
from agfsync_jax.parallel import sharding
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import _chips, param_bytes, sample
from agfsync_jax.plans import train as train_plan
from agfsync_jax.plans._tables import too_large
from agfsync_jax.training.program import forward_passes, step_spec
from agfsync_jax.utils import flops
from configs import micro
from tests import released_folders

ROOT = Path(__file__).parents[1]


KEYS = {
    *("topology", "verb", "chips", "batch_per_chip", "largest_batch_per_chip", "fits"),
    *("param_bytes", "optimizer_bytes", "bytes_per_chip", "hbm_bytes"),
    *("flops_per_step", "analytic_flops_per_step", "collective_bytes", "collective_bytes_by_axes"),
    *("step_seconds", "bound", "mfu", "hours"),
}


@pytest.fixture
def config(tmp_path):
    """A tiny Stable Diffusion without weights."""
    released_folders.stable_diffusion(tmp_path / "tiny", "sd15")
    for path in (tmp_path / "tiny").rglob("*.safetensors"):
        path.unlink()
    config = micro.get_config()
    config.backbone.path = str(tmp_path / "tiny")
    config.sample.height = config.sample.width = 16
    config.sample.num_inference_steps = 3
    config.sample.device_batch_size = 2
    return config


def last_row(capsys):
    (row,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    return row


def test_the_devices_that_are_here(config, capsys):
    plan.main(config, None, json=True)
    row = last_row(capsys)
    assert set(row) == KEYS
    assert (row["topology"], row["verb"]) == ("8 x cpu here", "sample")
    assert row["batch_per_chip"] == 2
    assert row["collective_bytes"] == row["collective_bytes_by_axes"] == {}
    assert (row["chips"], row["optimizer_bytes"], row["largest_batch_per_chip"]) == (8, 0, None)
    # Products with padding are not done; nothing else is missing, and nothing is done twice.
    assert 0.8 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
    # A host's processor has no published numbers.
    assert [row[key] for key in ("fits", "hbm_bytes", "step_seconds", "mfu")] == [None] * 4


def test_split_parameters_take_less_and_examples_stay(config, monkeypatch, capsys):
    """And a chip that is too small is told, with what takes its memory."""
    mesh = create_mesh()
    whole = sample.abstract_backbone(config, mesh, config.backbone.path, "")
    config.mesh = {"data": 2, "fsdp": 4, "tensor": 1}
    config.sharding = ((r"(ff|proj|attn\d)\..*kernel", (None, "fsdp")),)
    split = sample.abstract_backbone(config, create_mesh(config.mesh), config.backbone.path, "")
    assert param_bytes(split.params) < param_bytes(whole.params)
    all_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole.params))
    assert param_bytes(whole.params) == all_bytes

    monkeypatch.setattr(_chips, "memory", lambda device: 2**19)
    plan.main(config, None, json=True)
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    # Activations stay where their examples are; weights are gathered, by the CPU before the loop.
    assert row["collective_bytes"].keys() <= {"all-gather"}
    assert row["fits"] is False and row["bytes_per_chip"] > 2**19
    assert "| NO |" in out
    assert "does not fit: needs " in out and "unet.up_blocks " in out
    assert "would help: a smaller --config.sample.device_batch_size" in out
    assert "--config.sample.param_dtype=bfloat16" in out


def test_without_libtpu_one_error_says_what_to_install():
    code = (
        "import sys; sys.modules['libtpu'] = None; from agfsync_jax import cli\n"
        "sys.exit(cli.main(['plan', '--config=configs/micro.py', '--topology=v5e:2x2']))"
    )
    env = {key: value for key, value in os.environ.items() if key != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("agfsync: error: Compiling for a TPU needs libtpu")
    assert "pip install jax[tpu]" in line


def test_scoring(tmp_path, capsys):
    """The shipped BLIP-2 on the devices of one process."""
    config = micro.get_config()
    config.score.device_batch_size = 2
    plan.main(config, None, json=True, verb="score")
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    assert (row["verb"], row["batch_per_chip"]) == ("score", 2)
    assert 0.9 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
    assert "a step is a batch of 32 questions" in out
    config.scorers.vqa.path = "some/blip3"
    with pytest.raises(FileNotFoundError, match="knows the sizes of blip2-flan-t5-xl, blip2-flan"):
        plan.main(config, None, verb="score")
    del config.scorers.vqa
    with pytest.raises(ValueError, match="no scorer named vqa"):
        plan.main(config, None, verb="score")


def test_training(config, capsys, monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda kind: {"cpu": 1e12}[kind])
    chip = _chips.Chip(memory=2**30, memory_bandwidth=1e11, network_bandwidth=1e10)
    monkeypatch.setattr(_chips, "chip", lambda device: chip)
    monkeypatch.setattr(sharding, "_SMALL", 0)  # so that this model's weights are split, too
    config.backbone.dtype = "bfloat16"
    config.train.batch_size, config.train.device_batch_size = 16, 1
    config.mesh = {"data": 1, "fsdp": 8, "tensor": 1}
    config.sharding = ((r"kernel$", "fsdp"),)
    plan.main(config, None, json=True, verb="train")
    out = capsys.readouterr().out
    row = json.loads(out.strip().splitlines()[-1])["rows"][0]
    assert (row["verb"], row["batch_per_chip"]) == ("train", 2)
    # Gradients have products that the formula counts as twice a forward pass.
    assert 0.6 < row["flops_per_step"] / row["analytic_flops_per_step"] < 1.4
    by_axes = row["collective_bytes_by_axes"]
    assert {name.partition(" over ")[2] for name in by_axes} == {"fsdp"}
    assert sum(row["collective_bytes"].values()) == sum(by_axes.values()) > 0
    assert row["step_seconds"] > 0 and row["hours"] > 0 and row["bound"] and row["fits"]
    # Weights are gathered and gradients summed; activations stay where their examples are.
    assert row["collective_bytes"].keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    row["hbm_bytes"] = 2**19
    work = train_plan.work(config, jax.devices(), "here")
    (text, _) = too_large(row, work)
    assert "params.up_blocks " in text and "opt_state.mu " in text and "opt_state.nu " in text
    # Two moments, split as the parameters are.
    assert 2 <= row["optimizer_bytes"] / row["param_bytes"] < 2.01
    assert "8 passes of an image each by formula" in out and "| optimizer |" in out
    # A reference that moves is beside the parameters, too; a loss of scores is given them.
    config.train.reference_decay, config.loss.name = 0.9, "smpo"
    work = train_plan.work(config, jax.devices(), "here")
    held, beside = param_bytes(work.params), param_bytes(work.optimizer)
    assert beside / (held - beside) == pytest.approx(3, rel=1e-3)
    config.train.reference_decay, config.loss.name = 0.0, "diffusion_dpo"
    config.train.lora_rank = 2
    assert forward_passes(step_spec(config)) == 6
    config.loss.name = "sft"
    assert forward_passes(step_spec(config)) == 4


def test_training_on_rankings(config):
    """Each of a prompt's candidates costs what an image of a pair does."""
    config.train.batch_size, config.sample.num_candidates = 8, 5
    pairs = train_plan.work(config, jax.devices(), "here")
    config.loss.name, config.pair.strategy, config.train.inversion_steps = "dgpo", "ranked", 10
    ranked = train_plan.work(config, jax.devices(), "here")
    assert ranked.step_flops / pairs.step_flops == pytest.approx(5 / 2, rel=1e-3)
    assert "8 rankings of 5 images, 20 passes of an image each" in ranked.notes[0]
    assert "up to 10 passes of each image find its noise, which takes " in ranked.notes[1]
    assert len(pairs.notes) == 1
    config.pair.strategy = "best_worst"
    assert train_plan.work(config, jax.devices(), "here").step_flops == pairs.step_flops


def test_training_on_images_of_many_shapes(config):
    """The largest that there are decide."""
    config.train.batch_size, config.sample.height, config.sample.width = 8, 64, 96
    largest = train_plan.work(config, jax.devices(), "here")
    config.sample.height, config.sample.width, config.pair.buckets = 97, 65, 32
    several = train_plan.work(config, jax.devices(), "here")
    assert several.step_flops == largest.step_flops
    assert len(largest.notes) == 1 and "up to 5 shapes" in several.notes[1]


class TestWithLibtpu:
    @pytest.fixture(autouse=True)
    def libtpu(self):
        pytest.importorskip("libtpu")

    def test_a_tiny_model_for_a_tpu(self, config, capsys):
        config.backbone.dtype = "bfloat16"
        config.sample.device_batch_size = 2
        plan.main(config, None, json=True, topology="v5e:2x2")
        row = last_row(capsys)
        assert set(row) == KEYS
        assert (row["topology"], row["batch_per_chip"], row["fits"]) == ("v5e:2x2", 2, True)
        assert row["hbm_bytes"] == 15.75 * 2**30
        assert row["collective_bytes"] == {}
        assert 0.8 < row["flops_per_step"] / row["analytic_flops_per_step"] <= 1
        assert row["step_seconds"] > 0 and 0 < row["mfu"] <= 1
        assert row["bound"] in ("compute", "memory")

    def test_scoring_for_a_tpu(self, capsys):
        config = micro.get_config()
        config.score.mesh.fsdp = 4
        config.score.device_batch_size = 16
        config.scorers.vqa.sharding = ((r"fc1\.kernel", (None, "fsdp")),)
        plan.main(config, None, json=True, topology="v5e:4x4", verb="score")
        out = capsys.readouterr().out
        row = json.loads(out.strip().splitlines()[-1])["rows"][0]
        assert row["fits"] is True and row["batch_per_chip"] == 16 and row["step_seconds"] > 0
        assert "| v5e:4x4 | 16 | 16 |" in out and " questions |" in out
