"""Samplers against diffusers' schedulers, driven by the same denoiser from the same noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion import samplers
from agfsync_jax.diffusion.schedules import Schedule

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 0.4


def denoise_jax(latents, timesteps):
    scale = jnp.cos(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
    return jnp.tanh(latents @ WEIGHT + 0.2) * scale


def denoise_torch(latents, timestep):  # [b, c, h, w]
    scale = torch.cos(timestep.float() / 300)
    hidden = torch.einsum("bchw,cd->bdhw", latents, torch.from_numpy(WEIGHT))
    return torch.tanh(hidden + 0.2) * scale


def run_diffusers(scheduler, noise, num_steps):
    scheduler.set_timesteps(num_steps)
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = denoise_torch(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents.permute(0, 2, 3, 1).numpy()


def run_ours(name, config, noise, num_steps):
    schedule, sampler = Schedule.from_config(config), samplers.find(name)
    return jax.jit(lambda x: sampler(denoise_jax, schedule, x, num_steps))(noise)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace", "set_alpha_to_one": True, "steps_offset": 0},
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps_offset": 0},
    ],
)
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_final_latents_equal_diffusers(name, changes, prediction_type):
    config = SD | changes | {"prediction_type": prediction_type}
    scheduler = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[name]
    noise = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
    theirs = run_diffusers(scheduler.from_config(config), noise, 20)
    ours = run_ours(name, config, noise, 20)
    assert ours.dtype == jnp.float32
    # Where a schedule drives the latents far from 1 the bound is relative to them.
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_zero_terminal_snr_equals_diffusers(name):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config = SD | changes | {"prediction_type": "v_prediction"}
    scheduler = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[name]
    noise = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
    theirs = run_diffusers(scheduler.from_config(config), noise, 20)
    assert np.abs(run_ours(name, config, noise, 20) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_spacing_defaults_to_the_samplers_own():
    config = {key: value for key, value in SD.items() if key != "steps_offset"}
    schedule = Schedule.from_config(config)
    assert schedule.timesteps(4).tolist() == [750, 500, 250, 0]
    assert schedule.timesteps(4, spacing="linspace").tolist() == [999, 666, 333, 0]


def test_a_trajectory_is_one_loop():
    schedule = Schedule.from_config(SD)
    program = jax.make_jaxpr(lambda x: samplers.ddim(denoise_jax, schedule, x, 50))(
        jnp.zeros((1, 2, 2, 4))
    )
    assert str(program).count("tanh") == 1


def test_an_unknown_sampler_lists_the_known():
    with pytest.raises(ValueError, match="'ddpm'.*ddim, euler"):
        samplers.find("ddpm")
