"""Pseudo linear multistep (arXiv:2202.09778, eqs. 9 and 12), with `num_steps + 1` evaluations.

With skip_prk_steps, which Stable Diffusion 1 and 2 draw with. Where a span starts late, it repeats
that span's second timestep as it does the trajectory's; diffusers would take a repetition for
granted that its pipelines do not make.
"""

import jax.numpy as jnp
import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, integers
from agfsync_jax.samplers import Sampler, memories


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    timesteps = integers(fields.spaced(num_steps))
    timesteps = timesteps[fields.within(span, timesteps)]
    # The second timestep comes twice: first to step again from the start, with the mean of the
    # predictions at both ends (Heun's method).
    timesteps = np.insert(timesteps, 1, timesteps[1:2])
    again = np.arange(len(timesteps)) == 1
    origins = timesteps + fields.num_train_timesteps // num_steps * again
    # Weights of this prediction and of the three before it: Adams-Bashforth of rising order.
    weights = np.tile([55 / 24, -59 / 24, 37 / 24, -9 / 24], (len(timesteps), 1))
    first = [
        [1, 0, 0, 0],
        [1 / 2, 1 / 2, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -4 / 3, 5 / 12, 0],
    ]
    weights[:4] = first[: len(timesteps)]
    rows = {"again": again, "weights": weights}
    return Trajectory(timesteps, rows | fields.stride(origins, num_steps))


def step(model, row, latents, start, *before):
    again = row["again"]
    prediction = model.predict(latents)
    terms = zip(row["weights"], (prediction, *before), strict=True)
    mean = sum(weight * term for weight, term in terms)
    origin = jnp.where(again, start, latents)
    clean, noise = model.split(origin, mean)
    recent = [
        jnp.where(again, old, new)
        for old, new in zip(before, (prediction, *before[:-1]), strict=True)
    ]
    return row["next_signal"] * clean + row["next_sigma"] * noise, origin, *recent


SAMPLER = Sampler(
    scheduler="PNDMScheduler",
    defaults=NOISE
    | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"},
    trajectory=trajectory,
    step=step,
    start=memories(4),
    supported={"prediction_type": ("epsilon", "v_prediction"), "skip_prk_steps": (True,)},
)
