"""Inverted noise: beside diffusers' DDIMInverseScheduler, and in the objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from agfsync_jax import cli, samplers
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import diffusion_dpo
from agfsync_jax.training import inversion
from agfsync_jax.training.objective import preference_loss

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
    ],
)
def test_what_does_not_go_with_it_is_told_at_once(tmp_path, capsys, changes, told):
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    flags += ["--config=configs/micro.py:tiny", "--config.train.inversion_steps=10"]
    assert cli.main(["run", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
def test_a_ranking_has_noise_for_each_image(tmp_path):
    """The whole road, on the suite that ships."""
    flags = ["--config=configs/micro.py:tiny", f"--workdir={tmp_path}"]
    flags += ["--config.train.inversion_steps=5", "--config.train.timesteps=400:1000"]
    flags += ["--config.pair.strategy=ranked", "--config.loss.name=dgpo"]
    flags += ["--config.train.batch_size=2", "--config.train.num_steps=1"]
    for verb in ("prompts", "questions", "sample", "score", "pair", "train"):
        assert cli.main([verb, *flags]) == 0
    files = sorted((tmp_path / "round_000/inversion").glob("*.npy"))
    shapes = {np.load(path).shape for path in files}
    assert len(shapes) == 1 and shapes.pop()[:3] == (2, 3, 3)  # examples, images, timesteps
