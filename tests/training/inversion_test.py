"""Inverted noise: beside diffusers' DDIMInverseScheduler, and in the objective."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from agfsync_jax import cli, samplers
from agfsync_jax.data import records
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import diffusion_dpo
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training import inversion
from agfsync_jax.training.objective import preference_loss
from tests import released_folders

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NOISE |= {"clip_sample": False, "steps_offset": 1}


def smooth(x, times):
    """A denoiser's prediction, of numpy or jax arrays alike."""
    return 0.6 * x + 0.1 * x[..., ::-1] - 0.0002 * times.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noise_is_that_of_diffusers(prediction_type):
    config = NOISE | {"prediction_type": prediction_type}
    scheduler = DDIMInverseScheduler(**config, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    schedule = Schedule.from_config(config)
    timesteps = inversion.grid(schedule, 10)
    np.testing.assert_array_equal(timesteps, scheduler.timesteps)
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    noise = np.asarray(inversion.invert(smooth, schedule, jnp.asarray(latents), timesteps))
    x = torch.from_numpy(latents).double()
    for index, t in enumerate(scheduler.timesteps):
        prediction = torch.from_numpy(smooth(x.numpy(), np.full(2, float(t))))
        x = scheduler.step(prediction, t, x).prev_sample
        alpha = float(scheduler.alphas_cumprod[t])
        wanted = (x.numpy() - np.sqrt(alpha) * latents) / np.sqrt(1 - alpha)
        np.testing.assert_allclose(noise[:, index], wanted, atol=2e-5 * np.abs(wanted).max())


def test_sampling_leads_back_to_the_image():
    schedule = Schedule.from_config(NOISE)
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32))
    errors = []
    for steps in (50, 200):
        timesteps = inversion.grid(schedule, steps)
        noise = inversion.invert(smooth, schedule, latents, timesteps)[:, -1]
        start = schedule.add_noise(latents, noise, jnp.full(2, timesteps[-1]))
        sampler = samplers.find("ddim", schedule)
        back = sampler(smooth, schedule, start, steps)
        errors.append(float(jnp.abs(back - latents).max()))
    assert errors[1] < 0.4 * errors[0] < 0.1


def test_the_objective_takes_noise_and_timesteps_of_the_batch():
    """Each image its own noise, against the formula in float64."""
    schedule, rng = Schedule.from_config(NOISE), np.random.default_rng(1)
    latents, noise = rng.standard_normal((2, 3, 2, 4, 4, 4), np.float32)
    times = np.array([101, 501, 901])
    batch = {"latents": latents, "noise": noise, "timesteps": times, "conditioning": {}}
    batch |= {"example": np.arange(3)}
    loss, metrics = preference_loss(
        *(1.0, 0.9, jax.tree.map(jnp.asarray, batch)),
        loss=diffusion_dpo.LOSS.configured(beta=60.0),
        denoise=lambda scale, x, times, _: scale * smooth(x, times),
        schedule=schedule,
        seed=0,
        step=jnp.int32(0),
    )
    alpha = schedule.alphas_cumprod[times].astype(np.float64).reshape(3, 1, 1, 1, 1)
    x = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * noise
    predicted = smooth(x.reshape(6, 4, 4, 4), np.repeat(times, 2)).reshape(x.shape)
    policy, reference = (((s * predicted - noise) ** 2).mean((2, 3, 4)) for s in (1.0, 0.9))
    rewards = -30.0 * (policy - reference)
    wanted = np.log1p(np.exp(-(rewards[:, 0] - rewards[:, 1]))).mean()
    assert float(loss) == pytest.approx(wanted, rel=1e-5) and abs(wanted - np.log(2)) > 0.01
    assert metrics["count_by_time"].sum() == 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.flip": True, "pair.flips": True}, "config.train.flip=True wants other noise"),
        ({"train.noise_offset": 0.1}, "config.train.noise_offset=0.1 wants other noise"),
        ({"train.timesteps": "5:9"}, "'5:9' has none of the timesteps of an inversion in"),
        ({"train.inversion_steps": 2000}, "leads beyond the model's 1000 timesteps"),
    ],
)
def test_what_does_not_go_with_it_is_told_at_once(tmp_path, capsys, changes, told):
    flags = ["--config=configs/micro.py:tiny", "--config.train.inversion_steps=10"]
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    assert cli.main(["run", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert told in capsys.readouterr().err


def loader_of(tokens):
    latents = np.ones((2, len(tokens), 2, 2, 4), np.float16)
    pairs = {"pair_id": [str(n) for n in range(len(tokens))], "token_ids": tokens[:, None]}
    pairs |= {"chosen_latents": latents[0], "rejected_latents": latents[1]}
    return PairLoader(pairs, 8, 0, create_mesh({"data": -1, "fsdp": 1, "tensor": 1}))


def test_noise_is_made_once_of_pairs_with_their_prompts(tmp_path, monkeypatch):
    """A file that is whole stays; other prompts or steps, and a full disk, are seen at once."""
    wanted, made, loader = np.array([1, 501]), [], loader_of(np.arange(12))
    values = np.random.default_rng(0).normal(size=(12, 2, 2, 2, 2, 4)).astype(np.float16)

    def noise(loader, limit=9, steps=2):
        def program(rows):
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(rows)
            return values[rows]

        timesteps = np.arange(steps) * (1000 // steps) + 1
        folder = tmp_path / "a/b"
        return inversion.inverted_noise(folder, loader, program, timesteps, wanted, ["model"])

    with pytest.raises(KeyboardInterrupt):
        noise(loader, limit=1)
    for _ in range(2):
        found = noise(loader)(np.array([11, 0, 11, 7]), np.array([1, 0, 0, 1]))
        np.testing.assert_array_equal(found, values[[11, 0, 11, 7], [1, 0, 0, 1]])
    np.testing.assert_array_equal(made, [range(8), [8, 9, 10, 11, 0, 1, 2, 3]])
    noise(loader_of(np.arange(12) + 1))
    assert len(made) == 4
    noise(loader_of(np.arange(12) + 1), steps=4)
    assert len(made) == 6
    monkeypatch.setattr(inversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="needs 0.0 MB and 0.0 MB are free: make room, lower"):
        noise(loader)
    assert len(made) == 6


def test_a_ranking_has_noise_for_each_image(tmp_path):
    """Typed as a user types it: from scored candidates to a training."""
    released_folders.stable_diffusion(tmp_path / "tiny", "sd15")
    folder, rng = tmp_path / "round_000", np.random.default_rng(0)
    prompts = [{"id": f"p{n}", "prompt": f"{n} circles"} for n in range(9)]
    records.write_jsonl(
        folder / "prompts.jsonl", [row | {"category": "", "source": ""} for row in prompts]
    )
    keys = [{"prompt_id": row["id"], "candidate": n} for row in prompts for n in range(3)]
    image = {"seed": 0, "image": encode_png(np.zeros((64, 64, 3), np.uint8))}
    candidates = [
        key | image | {"latents": rng.normal(size=(16, 16, 4)).astype(np.float16)} for key in keys
    ]
    shard = folder / "candidates/00000-of-00001.tfrecord"
    records.write_shard(shard, candidates, records.CANDIDATE_FEATURES)
    scores = [key | {"clip": float(key["candidate"])} for key in keys]
    records.write_parquet(folder / "scores/00000-of-00001.parquet", scores)
    flags = ["--config=configs/micro.py:tiny", f"--workdir={tmp_path}"]
    flags += [f"--config.backbone.path={tmp_path / 'tiny'}", "--config.prompts.num_prompts=9"]
    flags += ["--config.pair.weights.vqa=0", "--config.pair.weights.aesthetic=0"]
    flags += ["--config.pair.strategy=ranked", "--config.loss.name=dgpo"]
    flags += ["--config.train.num_steps=1", "--config.train.inversion_steps=5"]
    flags += ["--config.train.timesteps=400:1000", "--config.pair.min_margin=0"]
    for verb in ("pair", "train"):
        assert cli.main([verb, *flags]) == 0
    files = [np.load(path) for path in sorted((folder / "inversion").glob("*/*.npy"))]
    assert [noise.shape for noise in files] == [(8, 3, 3, 16, 16, 4)] * 2  # timesteps, then images
    assert {noise.dtype for noise in files} == {np.dtype(np.float16)}
    (row,) = (folder / "checkpoints/metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 1
