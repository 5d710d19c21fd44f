import functools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from agfsync_jax import backbones, pair, train
from agfsync_jax import run as loop
from agfsync_jax.data.images import decode_png, encode_png
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.data.pairs import pair_features, read_pairs, write_pairs
from agfsync_jax.models import lora
from agfsync_jax.parallel import sharding
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.steps import settings
from agfsync_jax.training import inversion, symptoms
from agfsync_jax.training.checkpoints import (
    Checkpoints,
    find_step,
    restore_adapters,
    restore_denoiser,
    restore_trained,
    trained_rounds,
)
from agfsync_jax.training.objective import preference_loss
from agfsync_jax.training.step import inversion_step
from agfsync_jax.utils import flops
from agfsync_jax.utils.metrics import MetricWriter, read_metrics
from configs import common
from tests.processes import ROOT, run_processes
from tests.tiny_backbone import ReadingBackbone, TinyBackbone, assert_equal, largest_difference

BETA = 100.0
_SIDES = ("chosen", "rejected")
LN2 = pytest.approx(math.log(2), abs=BETA * 1e-7)  # beta times the rounding of an error


@pytest.fixture
def backbone():
    return TinyBackbone.load("")


@pytest.fixture(scope="module", autouse=True)
def tiny_backbone():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backbones, "backbone_class", lambda config: TinyBackbone)
        yield


def make_config(**changes):
    config = common.get_config()
    config.loss.diffusion_dpo = ConfigDict(dict(beta=BETA))
    config.train.batch_size = 8
    config.train.num_steps = 5
    config.train.save_every = 2
    config.train.warmup_steps = 2
    config.train.learning_rate = 1e-3
    config.update_from_flattened_dict(changes)
    return config


def make_workdir(path, round_index=0, num_pairs=12, embeddings=False, columns=(), shapes=((8, 8),)):
    """A workdir with random pairs of five prompts, whose embeddings may be stored; of people, or
    made of scores if there are `columns`. A third has the last one of `shapes`, others the first.
    """
    backbone = TinyBackbone.load("")
    rng = np.random.default_rng(round_index)
    png = encode_png(np.zeros((8, 8, 3), np.uint8))
    rows = []
    for index in range(num_pairs):
        prompt = index % 5
        shape = shapes[-1 if index % 3 == 0 else 0]
        latents = rng.normal(size=(2, *shape, 4)).astype(np.float16)
        rows.append(
            {
                "pair_id": f"p{prompt}-{index}",
                "prompt_id": f"p{prompt}",
                "prompt": f"prompt {prompt}",
                "token_ids": np.array([prompt, 7, 9], np.int32),
                "chosen_latents": latents[0],
                "rejected_latents": latents[1],
                "chosen_candidate": 0,
                "rejected_candidate": 1,
                "chosen_image": png,
                "rejected_image": png,
                "chosen_score": 1.0,
                "rejected_score": 0.0,
                "margin": 1.0,
            }
        )
        rows[-1] |= {f"{side}_scores/{name}": 0.5 for side in _SIDES for name in columns}
        if columns:
            rows[-1]["chosen_score"] = 0.2 * index
        if embeddings:
            conditioning = backbone.encode_prompt(backbone.params, rows[-1]["token_ids"])
            for name, value in conditioning.items():
                rows[-1][f"embeddings/{name}"] = np.asarray(value, np.float16)
    metadata = {"description": "random", "license": "none"}
    stored = {"encoder_hidden_states": (3, 6)} if embeddings else {}
    features = pair_features(embeddings=stored, columns=columns)
    write_pairs(path / f"round_{round_index:03d}/pairs", rows, metadata, features)
    return path


def tuned(workdir, round_index=0):
    base = TinyBackbone.load("").params["unet"]
    folder = workdir / f"round_{round_index:03d}/checkpoints"
    return restore_denoiser([(folder, find_step(folder, "last", num_steps=1))], base)


def metrics(workdir, round_index=0):
    return read_metrics(workdir / f"round_{round_index:03d}/checkpoints/metrics.jsonl")


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_backbone):
    """The workdir of a run that nothing disturbed."""
    workdir = make_workdir(tmp_path_factory.mktemp("run"))
    train.main(make_config(), workdir)
    return workdir


def test_the_text_encoder_may_run_in_the_step(run, tmp_path):
    make_workdir(tmp_path)
    config = make_config(**{"train.embeddings": "step", "train.num_steps": 2})
    training = train.prepare(config, tmp_path / "round_000", [], None, 0)
    state = training.state
    for index, want in enumerate(metrics(run)[:2]):
        state, got = training.step(state, index)
        assert float(got["loss"]) == pytest.approx(want["loss"], rel=1e-5)


@pytest.mark.parametrize("embeddings", ["cached", "step"])
def test_utilization_is_told_where_the_peak_is_known(tmp_path, monkeypatch, embeddings):
    make_workdir(tmp_path)
    monkeypatch.setattr(flops, "peak", lambda kind: 1e9)
    train.main(make_config(**{"train.embeddings": embeddings, "train.num_steps": 1}), tmp_path)
    (row,) = metrics(tmp_path)
    backbone, tokens = TinyBackbone.load(""), jnp.zeros((1, 3), jnp.int32)
    one = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), backbone.encode_prompt(backbone.params, tokens)
    step = 8 * 8 * flops.count(backbone.denoise, backbone.params, *one)  # passes, pairs
    assert row["mfu"] * row["seconds"] * 8 * 1e9 == pytest.approx(step)


def test_the_moving_average_is_what_training_makes(run, tmp_path):
    """With diffusers' warm-up of the decay."""
    make_workdir(tmp_path)
    config = make_config(**{"train.ema_decay": 0.9})
    training = train.prepare(config, tmp_path / "round_000", [], None, 0)
    state = training.state
    average = jax.tree.map(np.array, state.params)
    for index in range(4):
        state, _ = training.step(state, index)
        decay = min(0.9, (2 + index) / (11 + index))
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.array(new), average, state.params
        )
    assert largest_difference(training.result(state)["params"], average) < 1e-6
    assert largest_difference(state.params, average) > 1e-4


def test_rankings_train_listwise(tmp_path, backbone):
    """Lists of different lengths; what pads them has no say."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "pair_id": f"p{index}",
            "prompt_id": f"p{index}",
            "prompt": "",
            "token_ids": np.array([index, 7, 9], np.int32),
            "candidates": np.arange(size, dtype=np.int32),
            "latents": rng.normal(size=(size, 8, 8, 4)).astype(np.float16),
            "scores": np.linspace(1, 0, size, dtype=np.float32),
            "margin": 1.0,
        }
        for index, size in enumerate([3, 2, 4, 4, 2, 3, 4, 3])
    ]
    folder = tmp_path / "round_000/pairs"
    write_pairs(folder, rows, {}, pair_features(ranked=True, images=False))
    config = make_config(**{"loss.name": "rankdpo", "train.num_steps": 2, "train.save_every": 2})
    train.main(config, tmp_path)
    first, second = metrics(tmp_path)
    assert first["rewards/margin"] == pytest.approx(0, abs=1e-4)
    assert second["loss"] != first["loss"] and math.isfinite(second["loss"])
    (folder.parent / "checkpoints").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="holds rankings, and config.loss.name wants pairs"):
        train.main(make_config(), tmp_path)


def test_a_loss_that_learns_from_the_scores_of_pairs(tmp_path):
    """They are the stored ones, in the order of the batch."""
    config = make_config(**{"loss.name": "smpo"})
    make_workdir(tmp_path / "scored", columns=("vqa",))
    training = train.prepare(config, tmp_path / "scored/round_000", [], None, 0)
    batch, rows = training.batch(0), training.loader.rows(0)
    np.testing.assert_allclose(batch["scores"], [[0.2 * row, 0.0] for row in rows], rtol=1e-6)
    _, metrics = training.step(training.state, 0)
    strength = np.tanh(0.1 * rows)
    np.testing.assert_allclose(metrics["labels/strength"], strength.mean(), rtol=1e-5)
    make_workdir(tmp_path / "people")
    with pytest.raises(ValueError, match="pairs that people made, and config.loss.name=smpo"):
        train.main(config, tmp_path / "people")
    path = make_workdir(tmp_path / "other", columns=("vqa",)) / "round_000/pairs"
    pairs = train.read_pairs
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="turn round"):
        patch.setattr(train, "read_pairs", lambda *a, **k: flipped(pairs(*a, **k)))
        train.load_pairs(path, config, training.spec, create_mesh())


def flipped(pairs):
    return pairs | {"chosen_score": -pairs["chosen_score"]}


def test_a_loss_of_rankings_takes_pairs_too(tmp_path, capsys):
    """DGPO of pairs is Diffusion-DPO divided by beta; and it is told that there could be more."""
    norms = {}
    for name in ("dgpo", "diffusion_dpo"):
        make_workdir(tmp_path / name)
        config = make_config(**{"loss.name": name, "train.num_steps": 2})
        config.loss.dgpo = ConfigDict(dict(beta=BETA))
        train.main(config, tmp_path / name)
        norms[name] = metrics(tmp_path / name)[0]["grad_norm"]
        told = "it learns from two of them" in capsys.readouterr().err
        assert told == (name == "dgpo")
    assert norms["dgpo"] * BETA == pytest.approx(norms["diffusion_dpo"], rel=1e-4)


def test_a_run_leaves_metrics_and_a_denoiser(run, backbone):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["loss"] == LN2
    assert rows[0]["rewards/margin"] == pytest.approx(0, abs=1e-4)
    names = {"loss", "grad_norm", "learning_rate", "chosen_error", "rejected_error", "seconds"}
    names |= {"divergence"}
    kinds = "chosen rejected margin margin_size accuracy weight".split()
    rewards = {f"rewards/{name}" for name in kinds}
    by_time = {name for name in rows[0] if name.startswith("error_by_time/")}
    assert set(rows[0]) - by_time == {"step"} | names | rewards
    known = {f"error_by_time/{low:02d}-{low + 10}%" for low in range(0, 100, 10)}
    assert by_time and by_time <= known
    assert all(math.isfinite(value) for row in rows for value in row.values())
    rates = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(rates, np.array([1 / 3, 2 / 3, 1, 1, 1]) * 1e-3, rtol=1e-6)
    assert 1e-4 < largest_difference(tuned(run), backbone.params["unet"]) < 1e-2
    stages = json.loads((run / "round_000/stages.json").read_text())
    assert stages["train"]["items"] == 5 * 8


def test_a_finished_run_is_skipped(run, capsys, monkeypatch):
    monkeypatch.setattr(train, "read_pairs", None)
    train.main(make_config(), run)
    assert "skipped 5 of 5 steps already there" in capsys.readouterr().err


def test_stored_embeddings_need_no_text_encoder(run, tmp_path, monkeypatch):
    make_workdir(tmp_path, embeddings=True)
    monkeypatch.setattr(TinyBackbone, "encode_prompt", None)
    training = train.prepare(make_config(), tmp_path / "round_000", [], None, 0)
    state = training.state
    for index, want in enumerate(metrics(run)[:2]):
        state, got = training.step(state, index)
        got = jax.device_get(got)
        for name in ("loss", "chosen_error", "rejected_error"):
            # float16 has 11 binary digits
            assert got[name] == pytest.approx(want[name], rel=2**-10), name
        assert got["chosen_error"] != want["chosen_error"]


@pytest.mark.parametrize("mode", ["cached", "stored", "step"])
def test_a_share_of_examples_is_learned_without_its_prompt(tmp_path, mode):
    """What they are conditioned on is what the text encoder makes of the empty prompt."""
    make_workdir(tmp_path, embeddings=mode == "stored")
    config = make_config(**{"train.empty_prompts": 0.5, "train.batch_size": 64})
    config.train.embeddings = "step" if mode == "step" else "cached"
    training = train.prepare(config, tmp_path / "round_000", [], None, 0)
    backbone, batch = TinyBackbone.load(""), training.batch(0)
    tokens = training.loader.token_ids[training.loader.prompt_rows(0)]
    empty = (tokens == TinyBackbone.tokenizer("")([""])).all(axis=1)
    assert 16 < empty.sum() < 48
    if mode == "step":
        np.testing.assert_array_equal(batch["token_ids"], tokens)
    else:
        wanted = backbone.encode_prompt(backbone.params, tokens)["encoder_hidden_states"]
        given = batch["conditioning"]["encoder_hidden_states"]
        np.testing.assert_allclose(given, wanted, rtol=1e-3 if mode == "stored" else 0)
    _, metrics = training.step(training.state, 0)
    assert metrics["loss"] == LN2


def test_killed_and_resumed_is_the_same_to_the_bit(run, tmp_path, monkeypatch):
    make_workdir(tmp_path)

    def die(self, step, values):
        if step == 4:
            raise RuntimeError("killed")
        return write(self, step, values)

    write = MetricWriter.write
    monkeypatch.setattr(MetricWriter, "write", die)
    with pytest.raises(RuntimeError, match="killed"):
        train.main(make_config(), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    monkeypatch.setattr(MetricWriter, "write", write)
    train.main(make_config(), tmp_path)  # from step 2
    assert timeless(metrics(tmp_path)) == timeless(metrics(run))
    assert_equal(tuned(tmp_path), tuned(run))


def test_a_signal_saves_the_step_and_stops(run, tmp_path, monkeypatch):
    make_workdir(tmp_path)

    def stop(self, step, values):
        if step == 2 and not caught:
            caught.append(step)
            signal.raise_signal(signal.SIGTERM)
        return write(self, step, values)

    def interrupt(*_):
        raise KeyboardInterrupt

    caught, write = [], MetricWriter.write
    monkeypatch.setattr(MetricWriter, "write", stop)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(make_config(**{"train.save_every": 100}), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
    folder = tmp_path / "round_000/checkpoints"
    # Step 3 was on the devices when the metrics of step 2 were read.
    assert [path.name for path in folder.iterdir() if path.name.isdecimal()] == ["3"]
    assert timeless(metrics(tmp_path)) == timeless(metrics(run))[:3]


@pytest.mark.parametrize(
    "mesh",
    [
        None,
        {"data": 1, "fsdp": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=["one device", "fsdp=8", "data=2 fsdp=4", "data=2 fsdp=2 tensor=2"],
)
def test_devices_do_not_matter(run, tmp_path, monkeypatch, mesh):
    """`run` is on data=8."""
    make_workdir(tmp_path)
    config = make_config()
    if mesh:
        config.mesh.update(mesh)
        config.sharding = (
            (r"to_[qv]\.kernel$", (None, "tensor")),
            (r"to_out\.0\.kernel$", ("fsdp", None)),
            (r"kernel$", "fsdp"),
        )
        monkeypatch.setattr(sharding, "_SMALL", 0)
    else:
        one = functools.partial(create_mesh, devices=jax.devices()[:1])
        monkeypatch.setattr(train.program, "create_train_mesh", lambda c: one(c.mesh))
    train.main(config, tmp_path)
    assert largest_difference(tuned(tmp_path), tuned(run)) < 1e-5
    for got, want in zip(metrics(tmp_path), metrics(run), strict=True):
        # Half of beta times the last digits of four errors of about 1.
        assert got["loss"] == pytest.approx(want["loss"], abs=BETA / 2 * 4 * 2**-23)


def test_a_run_goes_on_with_other_devices(run, tmp_path, monkeypatch):
    """Two devices, each with half of the kernels, until step 2; all eight from there."""
    make_workdir(tmp_path)
    monkeypatch.setattr(sharding, "_SMALL", 0)
    config = make_config(sharding=((r"kernel$", "fsdp"),))
    config.mesh.update({"data": 1, "fsdp": 2})
    write = MetricWriter.write
    with monkeypatch.context() as fewer:
        two = functools.partial(create_mesh, devices=jax.devices()[:2])
        fewer.setattr(train.program, "create_train_mesh", lambda c: two(c.mesh))

        def stop(self, step, values):
            write(self, step, values)
            if step == 2:
                signal.raise_signal(signal.SIGINT)

        fewer.setattr(MetricWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(config, tmp_path)
    assert len(metrics(tmp_path)) == 3
    config.mesh.update({"data": 2, "fsdp": 4})
    train.main(config, tmp_path)
    assert largest_difference(tuned(tmp_path), tuned(run)) < 1e-5
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5]


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from agfsync_jax import backbones, pair, train
from agfsync_jax import run as loop
from agfsync_jax.parallel import multihost
from tests.train_test import TinyBackbone, make_config
multihost.initialize()
backbones.backbone_class = lambda config: TinyBackbone
config = make_config(**json.loads(sys.argv[2]))
config.mesh.update(data=2, fsdp=2)
config.sharding = ((r"(to_q|to_out\\.0)\\.kernel$", ("fsdp", None)),)
train.main(config, Path(sys.argv[1]))
print(json.dumps("done"))
"""


@pytest.mark.slow  # pod_test does so, in a whole loop
def test_two_processes_train_the_same(run, tmp_path):
    make_workdir(tmp_path)
    run_processes(TWO_PROCESSES, tmp_path, "{}")
    assert largest_difference(tuned(tmp_path), tuned(run)) < 1e-5


@pytest.mark.parametrize(
    ("inversion_steps", "shapes"), [(4, ((8, 8),)), (0, ((8, 8), (4, 16)))], ids=["noise", "shapes"]
)
def test_two_processes_share_what_moves_and_what_is_held_out(tmp_path, inversion_steps, shapes):
    changes = {"train.reference_decay": 0.9, "train.auto_beta": 0.2, "train.held_out": 0.4}
    changes |= {"train.inversion_steps": inversion_steps}
    changes |= {"train.validate_every": 2, "train.num_validation_prompts": 0}
    one, two = (make_workdir(tmp_path / name, shapes=shapes) for name in ("one", "two"))
    train.main(make_config(**changes), one)
    run_processes(TWO_PROCESSES, two, json.dumps(changes))
    assert largest_difference(tuned(two), tuned(one)) < 1e-5
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() & {"beta", "validation/held_out/loss"}:
            assert left[name] == pytest.approx(right[name], rel=1e-3)
    assert "validation/held_out/loss" in left


def test_a_training_that_unlearns_both_images_says_so_once(tmp_path, monkeypatch, capsys):
    """Also where it was stopped and goes on."""
    monkeypatch.setattr(symptoms, "WINDOW", 1)
    monkeypatch.setattr(
        train.program,
        "step_program",
        lambda *_: (
            lambda state, frozen, batch: (
                state._replace(step=state.step + 1),
                unlearned(int(state.step)),
            )
        ),
    )
    make_workdir(tmp_path)
    said = []
    for steps in (3, 6):
        train.main(make_config(**{"train.num_steps": steps}), tmp_path)
        said.append(capsys.readouterr().err)
    assert "train: step 2: the policy gets worse at both images" in said[0]
    assert "gets worse" not in said[1] and len(metrics(tmp_path)) == 6


def unlearned(step):
    """Metrics whose rewards fall."""
    rewards = {"chosen": -step, "rejected": -2.0 * step, "margin": step, "weight": 0.4}
    values = {f"rewards/{name}": jnp.float32(value) for name, value in rewards.items()}
    values |= dict.fromkeys(("loss", "grad_norm"), jnp.float32(1))
    return values | dict.fromkeys(("error_by_time", "count_by_time"), jnp.zeros(10))


class FakeValidation:
    """Scores that rise and fall, and a picture."""

    scores = {2: 0.5, 4: 0.9, 5: 0.7}

    def __init__(self, config, workdir, mesh, backbone):
        assert set(backbone.params) == {"text_encoder"}  # all but the denoiser

    def __call__(self, networks):
        step = self.steps.pop(0)
        return {"vqa": self.scores[step]}, np.full((4, 6, 3), step, np.uint8)


def test_validation_is_watched_and_the_best_checkpoint_stays(run, tmp_path, monkeypatch, capsys):
    make_workdir(tmp_path)
    monkeypatch.setattr(train, "Validation", FakeValidation)
    monkeypatch.setattr(FakeValidation, "steps", [2, 4, 5], raising=False)
    changes = {"train.validate_every": 2, "train.save_every": 1, "train.keep": 1}
    config = make_config(**changes, **{"train.best": "vqa"})
    config.scorers.vqa = ConfigDict({"name": "vqa"})
    train.main(config, tmp_path)
    rows, folder = metrics(tmp_path), tmp_path / "round_000/checkpoints"
    shown = {row["step"]: row["validation/vqa"] for row in rows if "validation/vqa" in row}
    assert shown == FakeValidation.scores
    assert sorted(p.name for p in folder.iterdir() if p.name.isdecimal()) == ["4", "5"]
    assert decode_png((folder / "validation/000004.png").read_bytes())[0, 0, 0] == 4
    assert "step 4, validation: vqa 0.9" in capsys.readouterr().err
    # Watching changes nothing.
    names = set(rows[0]) - {"seconds"}
    assert [{n: row[n] for n in names & set(row)} for row in rows] == [
        {n: row[n] for n in names & set(row)} for row in metrics(run)
    ]
    (events,) = (folder / "tensorboard").iterdir()
    data = events.read_bytes()
    for name in (b"rewards/margin", b"validation/vqa", b"learning_rate", b"error_by_time/"):
        assert name in data
    assert data.count(b"\x89PNG") == 3


@pytest.mark.parametrize(("embeddings", "shapes"), [(False, ((8, 8), (4, 8))), (True, ((8, 8),))])
def test_pairs_of_some_prompts_are_held_out(tmp_path, embeddings, shapes):
    """They are those of whole prompts, nothing is learned of them, and validations tell of them."""
    make_workdir(tmp_path, num_pairs=20, embeddings=embeddings, shapes=shapes)
    changes = {"train.validate_every": 2, "train.num_validation_prompts": 0, "train.num_steps": 4}
    config = make_config(**changes, **{"train.held_out": 0.4, "train.best": "held_out/loss"})
    training = train.prepare(config, tmp_path / "round_000", [], None, 0)
    mesh = create_mesh()
    learned, kept = train.load_pairs(tmp_path / "round_000/pairs", config, training.spec, mesh)
    prompts = [{tuple(ids) for ids in each.token_ids.tolist()} for each in (learned, kept)]
    assert len(prompts[0]) + len(prompts[1]) == 5 and not prompts[0] & prompts[1]
    assert learned.num_pairs + kept.num_pairs == 20 and kept.num_pairs == 4 * len(prompts[1]) > 0
    assert training.loader.num_pairs == learned.num_pairs
    assert train.is_held_out(np.array(sorted(prompts[1])), 0.4).all()
    assert 70 < train.is_held_out(np.arange(3000).reshape(1000, 3), 0.1).sum() < 130

    start = training.held_out(training.state, training.frozen)
    assert start["held_out/loss"] == LN2 and start["held_out/accuracy"] == 0.5
    names = {"loss", "accuracy", "chosen", "rejected", "margin", "margin_size", "weight"}
    assert set(start) == {f"held_out/{name}" for name in names}
    params = jax.tree.map(lambda leaf: leaf * 1.01, training.state.params)
    moved = training.state._replace(params=params, step=jnp.int32(3))
    now = training.held_out(moved, training.frozen)
    assert now == training.held_out(moved._replace(step=jnp.int32(1)), training.frozen)
    values = {shape: [] for shape in shapes}
    for index in range(len(training.held_out.weights)):
        batch = training.held_out.batch(index)
        of_shape = values[batch["chosen_latents"].shape[1:3]]
        batch["latents"] = jnp.stack([batch.pop(f"{side}_latents") for side in _SIDES], axis=1)
        value, _ = preference_loss(
            *(params, training.frozen["base"], batch),
            loss=training.spec.loss,
            denoise=lambda p, *args: training.spec.backbone.denoise({"unet": p}, *args),
            schedule=training.spec.backbone.schedule,
            seed=training.spec.seed,
            step=jnp.int32(index),
        )
        of_shape.append(float(value))
    examples = read_pairs(tmp_path / "round_000/pairs", ["token_ids", "chosen_latents"])
    rows = zip(examples["token_ids"].tolist(), examples["chosen_latents"], strict=True)
    sides = [latents.shape[:2] for ids, latents in rows if tuple(ids) in prompts[1]]
    wanted = np.mean([np.mean(values[shape]) for shape in sides])
    assert now["held_out/loss"] == pytest.approx(wanted, rel=1e-5) != LN2

    train.main(config, tmp_path)
    rows = {row["step"]: row.get("validation/held_out/loss") for row in metrics(tmp_path)}
    assert rows[1] is None and rows[2] > 0 and rows[4] > 0
    folder = tmp_path / "round_000/checkpoints"
    best = find_step(folder, "best", 4, "held_out/loss", False)
    assert rows[best] == min(rows[2], rows[4])

    config.train.held_out = 1e-6
    with pytest.raises(ValueError, match="held_out=1e-06 of 20 pairs are none of them"):
        train.prepare(config, tmp_path / "round_000", [], None, 0)


@pytest.mark.parametrize("alpha, ratio", [(0.0, 1.0), (8.0, 4.0)])
def test_adapters_learn_by_their_alpha(tmp_path, alpha, ratio):
    """Adam's first step is as long as the learning rate, and B holds alpha / rank."""
    make_workdir(tmp_path)
    changes = {"train.lora_rank": 2, "train.lora_alpha": alpha, "train.warmup_steps": 0}
    training = train.prepare(make_config(**changes), tmp_path / "round_000", [], None, 0)
    state, _ = training.step(training.state, 0)
    for factors in state.params.values():
        np.testing.assert_allclose(np.median(np.abs(factors["B"])), ratio * 1e-3, rtol=1e-3)


def whole(kernel):
    """A kernel with the adapter that it may have."""
    if isinstance(kernel, lora.Branched):
        kernel = kernel.kernel + kernel.A @ kernel.B
    return np.array(kernel)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_training_ends_where_nothing_gets_better_and_its_best_step_is_read(
    tmp_path, monkeypatch, capsys, rank
):
    """The best step is no multiple of save_every; the checkpoint that is read is what it drew."""
    seen = {}

    class Watched(FakeValidation):
        scores = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8}

        def __call__(self, networks):
            is_pair = lambda x: isinstance(x, lora.Branched)  # noqa: E731
            seen[self.steps[0]] = jax.tree.map(whole, networks["unet"], is_leaf=is_pair)
            return super().__call__(networks)

    make_workdir(tmp_path)
    monkeypatch.setattr(train, "Validation", Watched)
    monkeypatch.setattr(Watched, "steps", [2, 4, 6, 8], raising=False)
    changes = {"train.validate_every": 2, "train.save_every": 5, "train.keep": 2}
    changes |= {"train.num_steps": 20, "train.patience": 2, "train.lora_rank": rank}
    changes |= {"train.ema_decay": 0.5}
    config = make_config(**changes, **{"train.best": "vqa"})
    config.scorers.vqa = ConfigDict({"name": "vqa"})
    train.main(config, tmp_path)
    said = capsys.readouterr().err
    assert "ended at step 8 of 20: no better vqa than 0.9, that of step 4, in 2 valid" in said
    base = TinyBackbone.load("").params["unet"]
    for which, step in (("best", 4), ("last", 8)):
        trained = trained_rounds(tmp_path, 0, config, which)
        assert trained == [(tmp_path / "round_000/checkpoints", step)]
        assert largest_difference(restore_denoiser(trained, base), seen[step]) < 1e-7
    train.main(config, tmp_path)  # it is over
    assert len(metrics(tmp_path)) == 8
    # A step that is neither: adapters alone, or a state with a moving average.
    (step,) = {int(p.name) for p in (tmp_path / "round_000/checkpoints").glob("[0-9]*")} - {4, 8}
    trained = trained_rounds(tmp_path, 0, config, str(step))
    assert step == 5 and largest_difference(restore_denoiser(trained, base), seen[4]) < 0.1


def test_a_round_begins_where_step_says(tmp_path, monkeypatch):
    make_workdir(make_workdir(tmp_path), round_index=1)
    config = make_config(**{"train.save_every": 1, "train.keep": 9})
    train.main(config, tmp_path)
    train.main(config, tmp_path, round_index=1, step="3")
    assert metrics(tmp_path, 1)[0]["loss"] == LN2  # the reference is the same step's
    with Checkpoints(tmp_path / "round_001/checkpoints") as checkpoints:
        reference = train.prepare(
            config,
            tmp_path / "round_001",
            trained_rounds(tmp_path, 0, config, "3"),
            checkpoints,
            start=0,
        ).frozen["base"]
    base = TinyBackbone.load("").params["unet"]
    assert_equal(reference, restore_denoiser([(tmp_path / "round_000/checkpoints", 3)], base))
    adapted = make_config(**{"train.lora_rank": 2})  # of the rounds before, where this one began
    found = trained_rounds(tmp_path, 1, adapted)
    assert [step for _, step in found] == [3, 5]
    shutil.rmtree(tmp_path / "round_001/checkpoints/5")
    with pytest.raises(ValueError, match="began where .'round_000': 3. ended, and --step=last"):
        train.main(config, tmp_path, round_index=1)


KILLED = """
import sys, time
from pathlib import Path
from agfsync_jax import backbones, pair, train
from agfsync_jax import run as loop
from agfsync_jax.utils.metrics import MetricWriter
from tests.train_test import TinyBackbone, make_config
backbones.backbone_class = lambda config: TinyBackbone
write = MetricWriter.write
def slowly(self, step, values):
    time.sleep(0.2)
    write(self, step, values)
MetricWriter.write = slowly
changes = {"train.num_steps": 40, "train.save_every": 3, "train.ema_decay": 0.9}
train.main(make_config(**changes), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_killed_five_times_and_resumed_is_the_same_to_the_bit(tmp_path):
    """SIGKILL at random steps: the same parameters and metrics as a run that nothing disturbed."""
    whole, killed = (make_workdir(tmp_path / name) for name in ("whole", "killed"))
    command = [sys.executable, "-c", KILLED]
    subprocess.run([*command, whole], check=True, cwd=ROOT)
    stops = np.random.default_rng(0).choice(np.arange(2, 39), 5, replace=False)
    for stop in sorted(stops):
        process = subprocess.Popen([*command, killed], cwd=ROOT)
        while process.poll() is None and len(metrics(killed)) < stop:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"killed after step {len(metrics(killed))}")
    subprocess.run([*command, killed], check=True, cwd=ROOT)
    assert timeless(metrics(killed)) == timeless(metrics(whole)) and len(metrics(whole)) == 40
    assert_equal(tuned(killed), tuned(whole))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"train.ema_decay": 0.9}, marks=pytest.mark.slow),
        pytest.param({"train.lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param({"train.lora_rank": 2, "train.ema_decay": 0.9}, marks=pytest.mark.slow),
        pytest.param({"train.reference_decay": 0.9}, marks=pytest.mark.slow),
        {"train.lora_rank": 2, "train.ema_decay": 0.9, "train.reference_decay": 0.8}
        | {"train.auto_beta": 0.2},
    ],
    ids=["all of it", "average", "adapters", "adapters' average", "reference", "reference and all"],
)
def test_a_training_that_ended_can_be_extended(tmp_path, changes):
    """To the bit, as if it had had all of its steps from the beginning; twice."""
    at_once, extended = (make_workdir(tmp_path / name) for name in ("at_once", "extended"))
    for workdir, lengths in ((at_once, (8,)), (extended, (3, 6, 8))):
        for length in lengths:
            config = make_config(**changes, **{"train.num_steps": length})
            settings.claim(workdir, config, steps)
            train.main(config, workdir)
    assert timeless(metrics(extended)) == timeless(metrics(at_once)) and len(metrics(at_once)) == 8
    assert_equal(tuned(extended), tuned(at_once))


def steps():
    return [module.main for module in loop.ROUND]


def test_an_extended_training_that_was_killed_goes_on(tmp_path, monkeypatch):
    """From where the shorter one ended, which holds its state in another way."""
    at_once, extended = (make_workdir(tmp_path / name) for name in ("at_once", "extended"))
    changes = {"train.lora_rank": 2, "train.save_every": 10}
    train.main(make_config(**changes), at_once)
    train.main(make_config(**changes, **{"train.num_steps": 3}), extended)
    write = MetricWriter.write

    def die(self, step, values):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(MetricWriter, "write", die)
        train.main(make_config(**changes), extended)
    assert MetricWriter.write is write
    train.main(make_config(**changes), extended)
    assert_equal(tuned(extended), tuned(at_once))


def test_pairs_of_another_workdir_are_read_where_they_lie(run, tmp_path, capsys):
    """One set of candidates serves several trainings."""
    source = make_workdir(tmp_path / "a")
    pairs = source / "round_000/pairs"
    config = make_config(**{"pair.path": str(pairs)})
    made = {"settings": config.pair.to_dict() | {"normalize": "rank"}, "made_from": "scores"}
    made["settings"]["backbone"] = "another"
    (pairs.parent / "pair.json").write_text(json.dumps(made))
    before = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    for name in ("b", "c"):
        pair.main(config, tmp_path / name)
        assert "are pairs already" in capsys.readouterr().err
        config.train.num_steps = 2
        train.main(config, tmp_path / name)
        assert "were made with config.backbone.path=another" in capsys.readouterr().err
        config.train.num_steps = 5
        train.main(config, tmp_path / name, repair=True)
        assert_equal(tuned(tmp_path / name), tuned(run))
        assert not (tmp_path / name / "round_000/pairs").exists()
    assert before == {
        path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()
    }

    config.train.num_steps = 6
    (pairs.parent / "pair.json").write_text(json.dumps(made | {"made_from": "other scores"}))
    with pytest.raises(ValueError, match="other pairs than this training has begun with"):
        train.main(config, tmp_path / "b")
    config.pair.shuffle_labels = True
    with pytest.raises(ValueError, match="shuffle_labels needs pairs of its own"):
        train.main(config, tmp_path / "d")


def test_damaged_pairs_of_another_workdir_are_mended_there(tmp_path):
    source = make_workdir(tmp_path / "a")
    path = source / "round_000/pairs/pairs-train.tfrecord-00000"
    path.write_bytes(path.read_bytes()[:-9])
    config = make_config(**{"pair.path": str(path.parent)})
    command = f"agfsync pair --config=... --workdir={source} --repair"
    with pytest.raises(ValueError, match=command):
        train.main(config, tmp_path / "b", repair=True)
    assert path.exists()


def test_a_batch_that_is_larger_than_the_pairs_is_told(run, tmp_path, capsys):
    make_workdir(tmp_path, num_pairs=5)
    train.main(make_config(**{"train.num_steps": 1}), tmp_path)
    told = capsys.readouterr().err
    assert "config.train.batch_size=8 is more than the 5 pairs" in told
    assert told.index("is more than") < told.index("train: 8 pairs in")
    make_workdir(tmp_path / "enough", num_pairs=8)
    train.main(make_config(**{"train.num_steps": 1}), tmp_path / "enough")
    assert "is more than" not in capsys.readouterr().err


BY_COMMAND = """
import sys
from agfsync_jax import backbones, checks, cli
from tests.tiny_backbone import TinyBackbone
backbones.backbone_class = lambda config: TinyBackbone
checks.check = lambda *_, **__: None
sys.exit(cli.main(sys.argv[1:]))
"""
CONFIG_FILE = """
from tests.train_test import make_config


def get_config(arg=None):
    return make_config(**{"train.save_every": 1})
"""


def test_a_full_disk_is_one_line_and_the_last_whole_checkpoint_goes_on(run, tmp_path):
    disk, config = tmp_path / "disk", tmp_path / "config.py"
    disk.mkdir()
    config.write_text(CONFIG_FILE)
    small = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(small, capture_output=True).returncode:
        pytest.skip("needs mount")
    command = [sys.executable, "-c", BY_COMMAND, "train", f"--config={config}", f"--workdir={disk}"]

    def train_there():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    try:
        make_workdir(disk)
        done = train_there()
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("train: ")]
        assert f"No space left to write a checkpoint to {disk}/round_000/checkpoints" in line
        folder = disk / "round_000/checkpoints"
        kept = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        subprocess.run(["mount", "-o", "remount,size=3m", disk], check=True)
        done = train_there()
        assert done.returncode == 0, done.stderr
        assert f"skipped {kept} of 5 steps already there" in done.stderr
        assert timeless(metrics(disk)) == timeless(metrics(run))
        assert_equal(tuned(disk), tuned(run))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_rounds_and_adapters(run, tmp_path):
    """Round 1, of LoRA, starts from round 0 and leaves a whole denoiser."""
    (tmp_path / "round_000").symlink_to(run / "round_000")
    make_workdir(tmp_path, round_index=1)
    config = make_config(**{"train.lora_rank": 2, "train.num_steps": 2, "train.save_every": 1})
    train.main(config, tmp_path, round_index=1)
    # The reference is round 0's model, not the backbone's.
    assert metrics(tmp_path, 1)[0]["loss"] == LN2
    start, end = tuned(run), tuned(tmp_path, round_index=1)
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, end)
    moved = {
        jax.tree_util.keystr(path[:-1], simple=True, separator=".")
        for path, change in jax.tree_util.tree_leaves_with_path(changes)
        if change
    }
    assert moved == {f"attn1.{name}.kernel" for name in ("to_q", "to_k", "to_v", "to_out.0")}


def test_the_reference_may_stay_that_of_round_0(run, tmp_path, monkeypatch):
    (tmp_path / "round_000").symlink_to(run / "round_000")
    make_workdir(tmp_path, round_index=1)
    config, base = make_config(**{"train.reference": "first"}), TinyBackbone.load("").params["unet"]
    trained = trained_rounds(tmp_path, 0, config)
    training = train.prepare(config, tmp_path / "round_001", trained, None, 0)
    assert_equal(training.frozen["base"], base)
    assert_equal(training.state.params, tuned(run))
    _, metrics = training.step(training.state, 0)
    assert metrics["loss"] != LN2


def test_a_reference_that_moves_begins_where_the_reference_is(run, tmp_path):
    """At what `config.train.reference` says, and no second copy of it lies there."""
    (tmp_path / "round_000").symlink_to(run / "round_000")
    make_workdir(tmp_path, round_index=1)
    base, trained = TinyBackbone.load("").params["unet"], trained_rounds(run, 0, make_config())
    for which, wanted in (("first", base), ("round", tuned(run))):
        config = make_config(**{"train.reference": which, "train.reference_decay": 0.5})
        training = train.prepare(config, tmp_path / "round_001", trained, None, 0)
        assert training.frozen["base"] is None
        assert_equal(training.state.params, tuned(run))
        assert_equal(training.state.reference, wanted)
        state, metrics = training.step(training.state, 0)
        assert (metrics["loss"] == LN2) == (which == "round")
        halfway = jax.tree.map(lambda a, b: 0.5 * (np.array(a) + b), wanted, state.params)
        assert largest_difference(state.reference, halfway) < 1e-6


def test_a_policy_may_start_elsewhere_than_its_reference(tmp_path, monkeypatch):
    def load(path, **settings):
        self = TinyBackbone.load("", **settings)
        if path == "other":
            self.params["unet"] = jax.tree.map(lambda x: 1.1 * x, self.params["unet"])
        return self

    make_workdir(tmp_path)
    monkeypatch.setattr(
        backbones,
        "backbone_class",
        lambda config: SimpleNamespace(
            load=load,
            denoiser_name="unet",
            tokenizer=TinyBackbone.tokenizer,
            open=TinyBackbone.open,
        ),
    )
    base = TinyBackbone.load("").params["unet"]
    training = train.prepare(
        make_config(**{"train.start": "other"}), tmp_path / "round_000", [], None, 0
    )
    assert_equal(training.frozen["base"], base)
    assert_equal(training.state.params, jax.tree.map(lambda x: 1.1 * x, base))


def test_three_rounds_of_adapters_add_up(tmp_path):
    """Each begins where the one before it ended; with a moving average, which is what is kept."""
    changes = {"train.lora_rank": 2, "train.num_steps": 3, "train.ema_decay": 0.5}
    config, ends = make_config(**changes), [TinyBackbone.load("").params["unet"]]
    for index in range(3):
        make_workdir(tmp_path, round_index=index)
        train.main(config, tmp_path, round_index=index)
        assert metrics(tmp_path, index)[0]["loss"] == LN2
        ends.append(tuned(tmp_path, index))
    trained = trained_rounds(tmp_path, 2, config)
    assert [folder.parent.name for folder, _ in trained] == ["round_000", "round_001", "round_002"]
    own = [restore_adapters(*each) for each in trained]
    for start, end, adapters in zip(ends, ends[1:], own, strict=False):
        assert largest_difference(lora.merge(start, adapters), end) < 1e-6
        assert largest_difference(start, end) > 1e-4
    whole = lora.merge(ends[0], lora.concatenate(own))
    assert largest_difference(whole, ends[-1]) < 1e-6


@pytest.mark.parametrize("embeddings", ["cached", "step"])
def test_inverted_noise_is_made_once_and_a_training_goes_on_with_it(
    tmp_path, monkeypatch, embeddings, capsys
):
    made, invert = [], inversion.invert
    monkeypatch.setattr("agfsync_jax.training.step.invert", lambda *a: made.append(a) or invert(*a))
    config = make_config(
        **{"train.inversion_steps": 10, "train.timesteps": "300:900", "train.held_out": 0.4},
        **{"train.validate_every": 2, "train.num_validation_prompts": 0, "train.num_steps": 2},
        **{"train.embeddings": embeddings},
    )
    make_workdir(tmp_path, num_pairs=12)
    train.main(config, tmp_path)
    folder = tmp_path / "round_000/inversion/learned"
    assert len(made) == 1 and len(list(folder.glob("*.npy"))) == 1  # those held out have their own
    first, *_ = metrics(tmp_path)
    assert first["loss"] == LN2
    assert {int(key[14:16]) for key in first if key.startswith("error_by_time")} <= set(
        range(30, 90)
    )
    config.train.num_steps = 3
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    train.main(config, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(made) == 1 and "inversion: skipped 8 of 8 pairs" in capsys.readouterr().err
    # What a step is given of an example is what the reference's inversion is.
    training = train.prepare(config, tmp_path / "round_000", [], None, 0)
    batch, noise = training.batch(1), training.loader.noise
    np.testing.assert_array_equal(noise.timesteps, [300, 400, 500, 600, 700, 800])
    given = training.loader.examples(rows := training.loader.rows(1))
    if training.embeddings:
        given["conditioning"] = training.embeddings(rows)
    spec, text = training.spec, training.frozen["text"]
    every = np.arange(0, 900, 100)
    again = jax.jit(functools.partial(inversion_step, spec=spec, timesteps=every, wanted=every))(
        training.frozen["base"], text, given
    )
    place = np.asarray(batch["timesteps"]) // 100
    wanted = np.asarray(again)[np.arange(len(rows)), place]
    np.testing.assert_allclose(batch["noise"], wanted, atol=4e-3)
    # Other pairs, other noise.
    made.clear()
    shutil.rmtree(tmp_path / "round_000/pairs")
    make_workdir(tmp_path, num_pairs=16)
    train.prepare(config, tmp_path / "round_000", [], None, 0)
    assert len(made) == 1


def test_adapters_of_text_encoders_add_up_over_rounds(tmp_path, monkeypatch):
    """Also at a step before the last one, which holds adapters alone."""
    monkeypatch.setattr(backbones, "backbone_class", lambda config: ReadingBackbone)
    changes = {"train.lora_rank": 2, "train.lora_text_encoder": True, "train.embeddings": "step"}
    config = make_config(**changes, **{"train.num_steps": 3, "train.learning_rate": 1e-2})
    base = ReadingBackbone.load("").params
    ends = {(0, "0"): base}
    for index in (0, 1):
        make_workdir(tmp_path, round_index=index)
        train.main(config, tmp_path, round_index=index)
        assert metrics(tmp_path, index)[0]["loss"] == LN2  # policy = reference, which has read
        for step in ("2", "last"):
            trained = trained_rounds(tmp_path, index, config, step)
            ends[index, step] = restore_trained(trained, base, "unet")
    for before, after in ((0, "0"), (0, "last")), ((0, "last"), (1, "2")), ((1, "2"), (1, "last")):
        for network in ("unet", "text_encoder"):
            assert largest_difference(ends[before][network], ends[after][network]) > 1e-4
    before = trained_rounds(tmp_path, 0, config)
    training = train.prepare(config, tmp_path / "round_001", before, None, 0)
    reference = {"unet": training.frozen["base"], **training.frozen["text"]}
    for network in reference:  # of round 1 is where round 0 ended
        here = jax.tree.map(np.asarray, reference[network])
        assert largest_difference(here, ends[0, "last"][network]) < 1e-6
    own = [restore_adapters(*each) for each in trained_rounds(tmp_path, 1, config)]
    for network, name in (("unet", ""), ("text_encoder", "text_encoder")):
        adapters = lora.concatenate([lora.of_network(each, name) for each in own])
        whole = lora.merge(base[network], adapters)
        assert largest_difference(whole, ends[1, "last"][network]) < 1e-6


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_good_state(
    tmp_path, monkeypatch
):
    def spoil(self, step):
        fields = batch(self, step)
        if step == 3:
            fields["chosen_latents"] *= jnp.nan
        return fields

    batch = PairLoader.batch
    monkeypatch.setattr(PairLoader, "batch", spoil)
    make_workdir(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 4: loss nan.* the state of step 2\."):
        train.main(make_config(), tmp_path)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "round_000/checkpoints/4").exists()


def test_bad_settings_are_told_before_any_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="agfsync pair"):
        train.main(make_config(), tmp_path)
    make_workdir(tmp_path, round_index=1)
    with pytest.raises(FileNotFoundError, match="agfsync train"):
        train.main(make_config(), tmp_path, round_index=1)
    with pytest.raises(ValueError, match="batch of 12 cannot be split over data x fsdp = 8"):
        odd = make_config(**{"train.batch_size": 12, "mesh.data": 8})
        train.main(odd, make_workdir(tmp_path))
    config = make_config()
    config.loss.diffusion_dpo.margin = 1.0
    with pytest.raises(ValueError, match="config.loss has margin, which diffusion_dpo does not"):
        train.main(config, tmp_path)


def test_pairs_of_other_settings_are_refused(tmp_path):
    make_workdir(tmp_path)
    config = make_config()
    made = {"settings": config.pair.to_dict() | {"normalize": "rank"}}
    (tmp_path / "round_000/pair.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match="another config.pair.normalize .'rank', now 'zscore'"):
        train.main(config, tmp_path)
