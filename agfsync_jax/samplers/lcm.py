"""Latent consistency sampling (arXiv:2310.04378, algorithm 3)."""

import jax.numpy as jnp
import numpy as np

from agfsync_jax.diffusion.schedules import NOISE
from agfsync_jax.diffusion.trajectories import Fields, Span, Trajectory, transfer
from agfsync_jax.samplers import THRESHOLDING, Sampler

_OF_DISTILLATION = "LCM visits timesteps of its distillation, and ends in a prediction of x_0"


def trajectory(fields: Fields, num_steps: int, span: Span) -> Trajectory:
    total, original = fields.num_train_timesteps, fields.original_inference_steps
    if not 1 <= num_steps <= original <= total:
        raise ValueError(
            f"num_inference_steps is {num_steps}: LCM takes 1 to original_inference_steps,"
            f" {original}, of at most {total}."
        )
    distilled = np.arange(original, 0, -1) * (total // original) - 1
    chosen = np.floor(np.linspace(0, original, num_steps, endpoint=False)).astype(int)
    timesteps = distilled[chosen].astype(np.int32)
    alphas = fields.alphas_cumprod.astype(np.float64)
    after = np.append(alphas[timesteps[1:]], 1.0)  # no noise at the end
    # The consistency function's boundary condition (arXiv:2310.04378, eq. 9), sigma_data = 0.5.
    scaled = timesteps * float(fields.timestep_scaling)
    rows = transfer(alphas[timesteps], after) | {
        "skip": 0.25 / (scaled**2 + 0.25),
        "out": scaled / np.sqrt(scaled**2 + 0.25),
        "bound": np.full(num_steps, fields.clip_bound),
        "index": np.arange(num_steps),
    }
    return Trajectory(timesteps, rows).cut(fields.within(span, timesteps))


def step(model, row, latents):
    clean = jnp.clip(model.clean(latents), -row["bound"], row["bound"])
    denoised = row["out"] * clean + row["skip"] * latents
    noise = model.noise(latents.shape)
    return (row["next_signal"] * denoised + row["next_sigma"] * noise,)


SAMPLER = Sampler(
    scheduler="LCMScheduler",
    defaults=NOISE
    | THRESHOLDING
    | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    },
    trajectory=trajectory,
    step=step,
    draws_noise=True,
    no_effect=dict.fromkeys(
        ("timestep_spacing", "steps_offset", "set_alpha_to_one"), _OF_DISTILLATION
    ),
)
