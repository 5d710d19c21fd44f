"""Evaluation with a stand-in model and scorers of one line; the referee is real."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax import backbones, evaluate, report
from agfsync_jax.data import records
from agfsync_jax.data.columns import Column
from agfsync_jax.data.images import decode_png
from agfsync_jax.diffusion.generation import Generator, row_seed
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.samplers import ddim
from agfsync_jax.scoring import engine
from agfsync_jax.training.checkpoints import Checkpoints
from agfsync_jax.utils import modules
from configs import common

METRICS = ["clip", "vqa", "referee", "referee_strict"]


class Brightness:
    """Answers "yes" to everything, and finds bright images beautiful."""

    def __init__(self, column):
        self.column, self.columns = column, {column: Column()}
        self.asks_questions = column == "vqa"

    def __call__(self, images, prompts, questions):
        columns = {self.column: images.mean((1, 2, 3)) / 255}
        if self.column == "vqa":
            columns["answers"] = [
                [
                    {
                        "answer": "yes",
                        "p_yes": 0.5,
                        "p_expected": 0.5,
                        "correct": question["answer"] == "yes",
                    }
                    for question in asked
                ]
                for asked in questions
            ]
        return columns


class Backbone:
    """A text-to-image model of three matrices; 64x64 images from 16x16x4 latents."""

    denoiser_name = "unet"
    schedule = Schedule.from_config({"clip_sample": False})

    def __init__(self):
        rng = np.random.default_rng(0)
        shapes = {"table": (128, 8), "unet": {"mix": (8, 4), "weight": (4, 4)}}
        self.params = jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    @classmethod
    def load(cls, path, *, mesh, rules, **settings):
        return cls()

    def latent_shape(self, height, width):
        return height // 4, width // 4, 4

    def tokenize(self, prompts):
        return np.array([[ord(letter) for letter in f"{text:40.40}"] for text in prompts], np.int32)

    def encode_prompt(self, params, tokens):
        return {"encoder_hidden_states": jnp.sin(params["table"][tokens])}

    def denoise(self, params, latents, timesteps, conditioning):
        context = conditioning["encoder_hidden_states"].mean(axis=1) @ params["unet"]["mix"]
        time = jnp.cos(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
        return jnp.tanh(latents @ params["unet"]["weight"] + context[:, None, None, :]) * time

    def decode_latents(self, params, latents):
        pixels = jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 4, axis=2)
        return jnp.round(jax.nn.sigmoid(pixels) * 255).astype(jnp.uint8)


@pytest.fixture(autouse=True)
def fake_backbone(monkeypatch):
    load, fake = modules.load, SimpleNamespace(Backbone=Backbone)
    monkeypatch.setattr(
        modules, "load", lambda room, name: fake if room == "backbones" else load(room, name)
    )


@pytest.fixture(autouse=True)
def fake_scorers(monkeypatch):
    def load(mesh, specs, *, batch_size):
        return {column: Brightness(column) for column in specs}

    monkeypatch.setattr(engine, "load_scorers", load)


def make_config(**changes):
    config = common.get_config()
    config.sample.height = config.sample.width = 64
    config.sample.num_inference_steps = 2
    config.sample.guidance_scale = 1.0
    config.sample.device_batch_size = 8
    config.sample.prompts_per_shard = 4
    config.scorers = {"vqa": {"name": "vqa"}, "clip": {"name": "clip"}}
    config.score.device_batch_size = 3
    config.score.mesh = {"data": 1, "fsdp": 1, "tensor": -1}  # so that a batch is of 3
    config.train.num_steps = 2
    config.evaluate.num_prompts = 6
    config.evaluate.evaluators = ("referee",)
    config.update_from_flattened_dict(changes)
    return config.lock()


def save_checkpoint(workdir, round_index=0, step=2, scale=0.8):
    tuned = jax.tree.map(lambda leaf: leaf * scale, Backbone().params["unet"])
    with Checkpoints(workdir / f"round_{round_index:03d}" / "checkpoints") as checkpoints:
        checkpoints.save(step, {"params": tuned}, wait=True)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "workdir"


@pytest.fixture
def done(made_once, tmp_path):
    """A copy of a workdir whose round 0 is evaluated."""
    config = make_config()
    if not made_once.exists():
        save_checkpoint(made_once)
        evaluate.main(config, made_once)
    return config, shutil.copytree(made_once, tmp_path / "workdir")


def forbid(*_, **__):
    raise AssertionError("this should not have been called")


def read_images(folder):
    return {
        (row["prompt_id"], row["candidate"]): row
        for shard in sorted(folder.glob("*.tfrecord"))
        for row in records.read_shard(shard, records.CANDIDATE_FEATURES)
    }


def test_everything_is_there_and_pairs_up(done):
    config, workdir = done
    evals = workdir / "round_000" / "evals"
    prompts = records.read_jsonl(evals / "prompts.jsonl")
    questions = records.read_jsonl(evals / "questions.jsonl")
    assert len(prompts) == 6 and {row["id"] for row in questions} == {row["id"] for row in prompts}
    base, tuned = (read_images(evals / name) for name in ("base", "tuned"))
    keys = {(row["id"], candidate) for row in prompts for candidate in range(2)}
    assert set(base) == set(tuned) == keys
    for key in keys:
        assert base[key]["seed"] == tuned[key]["seed"] == row_seed(config.seed, 0, *key)
        assert base[key]["image"] != tuned[key]["image"]

    rows = {
        name: records.read_parquet(evals / f"{name}-rows.parquet") for name in ("base", "tuned")
    }
    for name, images in (("base", base), ("tuned", tuned)):
        assert len(rows[name]) == 12
        for row in rows[name]:
            assert list(row)[:6] == ["prompt_id", "candidate", *METRICS]
            picture = decode_png(images[row["prompt_id"], row["candidate"]]["image"])
            assert row["clip"] == pytest.approx(picture.mean() / 255, rel=1e-5)
        answers = records.read_parquet(evals / f"{name}-answers.parquet")
        assert len(answers) == 2 * len(questions)
        assert {"element_type", "expected", "answer", "correct"} <= set(answers[0])
        means = json.loads((evals / f"{name}.json").read_text())
        assert list(means) == METRICS
        mean = np.mean([row["clip"] for row in rows[name]])
        assert means["clip"]["mean"] == pytest.approx(mean)
    comparison = json.loads((evals / "comparison.json").read_text())
    assert list(comparison["delta"]) == list(comparison["win_rate"]) == METRICS
    stages = json.loads((workdir / "round_000" / "stages.json").read_text())
    assert stages["evaluate"]["items"] == 24


def test_base_is_the_backbone_unperturbed(done):
    config, workdir = done
    backbone = Backbone()
    images = read_images(workdir / "round_000" / "evals" / "base")
    key = sorted(images)[3]
    texts = {
        row["id"]: row["prompt"]
        for row in records.read_jsonl(workdir / "round_000" / "evals" / "prompts.jsonl")
    }
    generator = Generator(
        backbone,
        create_mesh({"data": -1}),
        sampler=ddim.SAMPLER,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        batch_size=8,
    )
    seed = images[key]["seed"]
    latents, _ = generator(backbone.params, [texts[key[0]]], [seed], [False])
    np.testing.assert_allclose(latents[0], images[key]["latents"], rtol=2e-3, atol=1e-3)


def test_what_is_done_is_not_done_again(done, monkeypatch, capsys):
    config, workdir = done
    evals = workdir / "round_000" / "evals"
    before = (evals / "comparison.json").read_text()
    victim = sorted((evals / "tuned").glob("*.tfrecord"))[1]
    images = read_images(evals / "tuned")
    victim.unlink()
    victim.with_suffix(".parquet").unlink()
    evaluate.main(config, workdir)
    assert "skipped 6 of 8 shards" in capsys.readouterr().err
    again = read_images(evals / "tuned")
    assert {key: row["image"] for key, row in images.items()} == {
        key: row["image"] for key, row in again.items()
    }
    assert (evals / "comparison.json").read_text() == before

    monkeypatch.setattr(backbones, "generator", forbid)
    monkeypatch.setattr(engine, "load_scorers", forbid)
    evaluate.main(config, workdir)
    assert (evals / "comparison.json").read_text() == before


def test_a_later_round_reuses_the_base(done):
    config, workdir = done
    base = workdir / "round_000" / "evals" / "base"
    times = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    save_checkpoint(workdir, round_index=1, scale=0.6)
    evaluate.main(config, workdir, round_index=1)
    evals = workdir / "round_001" / "evals"
    assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == times
    assert not (evals / "base").exists()
    for name in ("base.json", "base-rows.parquet", "base-answers.parquet", "prompts.jsonl"):
        assert (evals / name).read_bytes() == (base.parent / name).read_bytes()
    assert (evals / "tuned.json").read_text() != (base.parent / "tuned.json").read_text()
    stages = json.loads((workdir / "round_001" / "stages.json").read_text())
    assert stages["evaluate"]["items"] == 12


def test_prompts_of_training_are_refused(done):
    """Whatever the config says by now: those of the workdir count, of this round and before."""
    config, workdir = done
    held = records.read_jsonl(workdir / "round_000/evals/prompts.jsonl")
    row = held[3] | {"id": "r000-00000", "prompt": f" {held[3]['prompt'].upper()}"}
    records.write_jsonl(workdir / "round_000/prompts.jsonl", [row])
    save_checkpoint(workdir, round_index=1, scale=0.6)
    for index in (0, 1):
        with pytest.raises(ValueError, match="1 of 6 held-out prompts are among those"):
            evaluate.main(config, workdir, round_index=index)
    # So do those of another workdir's candidates.
    other = workdir / "other/round_000"
    (other / "candidates").mkdir(parents=True)
    (workdir / "round_000/prompts.jsonl").rename(other / "prompts.jsonl")
    evaluate.main(config, workdir)
    config = config.copy_and_resolve_references().unlock()
    config.pair.path = str(other)
    with pytest.raises(ValueError, match="1 of 6 held-out prompts are among those"):
        evaluate.main(config, workdir)


@pytest.mark.parametrize("name", ["prompts.jsonl", "questions.jsonl"])
def test_other_prompts_than_those_that_were_drawn_are_refused(done, name):
    """A file that was edited: base and tuned would be compared on different pictures."""
    config, workdir = done
    path = workdir / "round_000" / "evals" / name
    rows = records.read_jsonl(path)
    rows[2] = rows[2] | {"id": "another"}
    records.write_jsonl(path, rows)
    with pytest.raises(ValueError, match=f"{name} has other rows .* the first .*'another'.*remove"):
        evaluate.main(config, workdir)


def test_what_is_asked_is_written_before_the_first_image(tmp_path, monkeypatch):
    save_checkpoint(tmp_path)
    evals = tmp_path / "round_000" / "evals"

    def draw(*_):
        assert len(records.read_jsonl(evals / "prompts.jsonl")) == 6
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(make_config(), tmp_path)
    assert records.read_jsonl(evals / "questions.jsonl")


def test_an_image_without_a_score_does_not_end_it(tmp_path, monkeypatch, capsys):
    call = Brightness.__call__

    def broken(self, images, prompts, questions):
        made = call(self, images, prompts, questions)
        if self.column == "clip":
            made["clip"] = made["clip"].astype(np.float32)
            made["clip"][0] = np.nan
        return made

    monkeypatch.setattr(Brightness, "__call__", broken)
    save_checkpoint(tmp_path)
    evaluate.main(make_config(**{"evaluate.evaluators": ()}), tmp_path)
    comparison = json.loads((tmp_path / "round_000/evals/comparison.json").read_text())
    assert comparison["left_out"] == {"clip": 5}
    assert "clip: 5 images have no finite score of both models: left out" in capsys.readouterr().err
    report.main(make_config(**{"evaluate.evaluators": ()}), tmp_path)
    assert "nan" not in (tmp_path / "summary.json").read_text().lower()


def test_a_batch_is_no_larger_than_the_work(tmp_path, monkeypatch):
    sizes, generator = [], backbones.generator

    def recorded(*args, **kwargs):
        made = generator(*args, **kwargs)
        sizes.append(made.batch_size)
        return made

    monkeypatch.setattr(backbones, "generator", recorded)
    save_checkpoint(tmp_path)
    evaluate.main(make_config(**{"sample.device_batch_size": 999}), tmp_path)
    assert sizes == [16]  # 12, and the devices divide it


def test_damage_is_named_and_repaired(done):
    config, workdir = done
    evals = workdir / "round_000" / "evals"
    before = (evals / "comparison.json").read_text()
    victim = sorted((evals / "tuned").glob("*.tfrecord"))[0]
    victim.write_bytes(victim.read_bytes()[:-7])
    victim.with_suffix(".parquet").unlink()
    with pytest.raises(records.RecordError, match=f"{victim.name}.*damaged at byte.*--repair"):
        evaluate.main(config, workdir)
    answers = victim.with_name(f"answers-{victim.stem}.parquet")  # without them, no scores either
    answers.write_bytes(answers.read_bytes()[:-7])
    evaluate.main(config, workdir, repair=True)
    assert (evals / "comparison.json").read_text() == before
    assert records.read_parquet(answers)


def test_a_kill_between_answers_and_scores_loses_neither(done, monkeypatch):
    config, workdir = done
    tuned, write = workdir / "round_000/evals/tuned", records.write_parquet
    before = {path: path.read_bytes() for path in sorted(tuned.glob("*00001*.parquet"))}
    assert len(before) == 2
    for path in before:
        path.unlink()

    def write_once(path, rows):
        if path in before and any(other.exists() for other in before):
            raise KeyboardInterrupt
        write(path, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(records, "write_parquet", write_once)
        evaluate.main(config, workdir)
    evaluate.main(config, workdir)
    assert {path: path.read_bytes() for path in before} == before


def test_needs_a_finished_training(tmp_path):
    config = make_config()
    with pytest.raises(FileNotFoundError, match="agfsync train"):
        evaluate.main(config, tmp_path)
    save_checkpoint(tmp_path, step=1)
    with pytest.raises(ValueError, match="ends at step 1 of config.train.num_steps=2"):
        evaluate.main(config, tmp_path)
