"""Heun's method in sigma (arXiv:2206.00364, algorithm 1), which calls the denoiser twice a step.

A step is Euler's, then Euler's again with the mean slope of both its ends; the last is Euler's
alone. A span holds whole steps. (diffusers' pipelines cut some in two, and go on a step too early.)
"""

import jax.numpy as jnp
import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, of_sigma
from agfsync_jax.samplers import SIGMAS, Sampler, memories


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps, sigmas = fields.interpolated(num_steps)
    part = fields.within(span, timesteps)
    at = np.repeat(np.arange(num_steps), 2)[1:]  # 0, 1, 1, 2, 2, ...: calls 2 i, 2 i + 1 of step i
    again = np.arange(len(at)) % 2 == 1
    after = np.append(sigmas[1:], 0.0)
    rows = {
        "keep": np.where(again, 1.0, after[at] / sigmas[at]),
        "slope": np.where(again, (sigmas[at - 1] / sigmas[at] - 1) / 2, 0.0),
        "bound": np.full(len(at), fields.clip_bound),
    } | of_sigma(sigmas[at])
    whole = Trajectory(timesteps[at], rows, fields.init_sigma(sigmas))
    return whole.cut(slice(2 * part.start, 2 * part.stop))


def step(model, row, latents, before):
    clean = jnp.clip(model.clean(row["signal"] * latents), -row["bound"], row["bound"])
    euler = clean + row["keep"] * (latents - clean)
    return euler + row["slope"] * (clean - before), clean


SAMPLER = Sampler(
    scheduler="HeunDiscreteScheduler",
    defaults=NOISE
    | SIGMAS
    | {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "clip_sample_range": 1.0},
    trajectory=trajectory,
    step=step,
    start=memories(1),
)
