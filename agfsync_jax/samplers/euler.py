"""Euler's method in sigma (arXiv:2206.00364, algorithm 2, without churn).

Latents are x_0 + sigma noise; the denoiser sees them scaled to a variance of 1.
"""

import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, of_sigma
from agfsync_jax.samplers import SIGMAS, Sampler


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = fields.interpolated(num_steps)
    end = fields.sigma_table[0] if fields.final_sigmas_type == "sigma_min" else 0.0
    # Not as a change of sigma: that would be the difference of two large latents, where the first
    # sigma is large.
    rows = {"keep": np.append(sigmas[1:], end) / sigmas} | of_sigma(sigmas)
    whole = Trajectory(timesteps, rows, fields.init_sigma(sigmas))
    return whole.cut(fields.within(span, timesteps))


def step(model, row, latents):
    clean = model.clean(row["signal"] * latents)
    return (clean + row["keep"] * (latents - clean),)


SAMPLER = Sampler(
    scheduler="EulerDiscreteScheduler",
    defaults=NOISE
    | SIGMAS
    | {
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
    },
    trajectory=trajectory,
    step=step,
    supported={"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
)
