"""DDIM with eta = 0 (arXiv:2010.02502, eq. 12)."""

import jax.numpy as jnp
import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, integers
from agfsync_jax.samplers import THRESHOLDING, Sampler


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps = integers(fields.spaced(num_steps))
    rows = {"bound": np.full(num_steps, fields.clip_bound)}
    whole = Trajectory(timesteps, rows | fields.stride(timesteps, num_steps))
    return whole.cut(fields.within(span, timesteps))


def step(model, row, latents):
    clean, noise = model.split(latents, model.predict(latents))
    clean = jnp.clip(clean, -row["bound"], row["bound"])
    return (row["next_signal"] * clean + row["next_sigma"] * noise,)


SAMPLER = Sampler(
    scheduler="DDIMScheduler",
    defaults=NOISE
    | THRESHOLDING
    | {
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    },
    trajectory=trajectory,
    step=step,
)
