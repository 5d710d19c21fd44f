"""Drives diffusers' schedulers and our samplers with the same denoiser from the same noise."""

import functools
import sys
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.utils import modules

SAMPLERS = {name: modules.load("samplers", name).SAMPLER for name in modules.names("samplers")}
SD = {
    "_class_name": "PNDMScheduler",
    "skip_prk_steps": True,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 0.4
NOISE = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
FAST = {"xla_backend_optimization_level": "0"}  # to compile: a trajectory here takes no time to run
KEYS = jax.vmap(jax.random.key)(np.arange(7, 9))


def denoise_jax(latents, timesteps):
    scale = jnp.cos(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
    return jnp.tanh(latents @ WEIGHT + 0.2) * scale


def denoise_torch(latents, timestep):  # [b, c, h, w]
    scale = torch.cos(timestep.float() / 300)
    hidden = torch.einsum("bchw,cd->bdhw", latents, torch.from_numpy(WEIGHT).to(latents.dtype))
    return torch.tanh(hidden + 0.2) * scale


def to_torch(latents):
    return torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2)


@functools.cache
def step_noise(index):
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), (8, 8, 4)))
    return to_torch(draw(KEYS))


@torch.no_grad()
def run_diffusers(
    scheduler, noise, num_steps, denoise=denoise_torch, *, timesteps=None, start=0, double=False
):
    """Drives a scheduler as the pipelines do, with the noise of our steps.

    Args:
        timesteps: those of a part of the trajectory, where it is not the whole.
        start: the index of the first; latents in the middle are taken as they are.
        double: the scheduler's own code, in float64.
    """
    scheduler.set_timesteps(num_steps)
    latents = to_torch(noise)
    if start == 0:
        latents = latents * scheduler.init_noise_sigma
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    indices = iter(range(start, 10_000))
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: step_noise(next(indices)))
        if double:
            patch.setattr(
                module, "torch", SimpleNamespace(**vars(torch) | {"float32": torch.double})
            )
            scheduler.sigmas, latents = scheduler.sigmas.double(), latents.double()
        for timestep in scheduler.timesteps if timesteps is None else timesteps:
            prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents.permute(0, 2, 3, 1).numpy()


def run_ours(name, config, noise, num_steps, denoise=denoise_jax, span=(0.0, 1.0)):
    schedule = Schedule.from_config(config)

    @functools.partial(jax.jit, compiler_options=FAST)
    def program(noise):
        return SAMPLERS[name](denoise, schedule, noise, num_steps, keys=KEYS, span=span)

    latents = program(noise)
    assert latents.dtype == jnp.float32
    return np.asarray(latents)


def scheduler_of(name, config):
    """diffusers' scheduler that a sampler says it equals."""
    sampler = SAMPLERS[name]
    return getattr(diffusers, sampler.scheduler).from_config(config, **sampler.variant)


def assert_equal_to_diffusers(name, config, num_steps=20):
    # Where latents are x_0 + sigma noise, the squared cosine begins at sigma 20291. In float32
    # diffusers' steps then lose 4e-4 of latents that end near 1, by its own steps in float64; ours
    # lose 1e-6.
    scheduler = scheduler_of(name, config)
    scheduler.set_timesteps(num_steps)
    double = scheduler.init_noise_sigma > 10_000 and not SAMPLERS[name].draws_noise
    timesteps = scheduler.timesteps.clone()
    # It cuts numbers of timesteps off: 999 becomes 998 where a processor's logarithm gives 998.999.
    last = len(Schedule.from_config(config).alphas_cumprod) - 1
    if config.get("use_karras_sigmas") and timesteps[0] == last - 1:
        timesteps[0] = last
    theirs = run_diffusers(scheduler, NOISE, num_steps, timesteps=timesteps, double=double)
    ours = run_ours(name, config, NOISE, num_steps)
    assert np.isfinite(theirs).all() and theirs.std() > 0.02
    # Where a schedule drives the latents far from 1 the bound is relative to them.
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


def cut(scheduler, num_steps, fraction):
    """The parts of a trajectory before and after a fraction, as the SDXL pipelines take them."""
    scheduler.set_timesteps(num_steps)
    total = scheduler.config.num_train_timesteps
    cutoff = int(round(total - fraction * total))
    late = int((scheduler.timesteps < cutoff).sum())
    early = len([timestep for timestep in scheduler.timesteps if timestep >= cutoff])
    start = len(scheduler.timesteps) - late
    return scheduler.timesteps[:early], scheduler.timesteps[start:], start
