"""Euler's method to below the next sigma, and noise up to it: DDPM's step (arXiv:2006.11239, eq. 7)
in sigma."""

import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, of_sigma
from agfsync_jax.samplers import Sampler, euler


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = fields.interpolated(num_steps)
    after = np.append(sigmas[1:], 0.0)
    up = np.sqrt(after**2 * (sigmas**2 - after**2) / sigmas**2)
    rows = {
        "keep": np.sqrt(after**2 - up**2) / sigmas,
        "up": up,
        "index": np.arange(num_steps),
    } | of_sigma(sigmas)
    whole = Trajectory(timesteps, rows, fields.init_sigma(sigmas))
    return whole.cut(fields.within(span, timesteps))


def step(model, row, latents):
    (below,) = euler.step(model, row, latents)
    return (below + row["up"] * model.noise(latents.shape),)


SAMPLER = Sampler(
    scheduler="EulerAncestralDiscreteScheduler",
    defaults=NOISE | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    trajectory=trajectory,
    step=step,
    draws_noise=True,
    supported={"prediction_type": ("epsilon", "v_prediction")},
)
