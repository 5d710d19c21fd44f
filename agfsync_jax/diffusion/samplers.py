"""Samplers: one function each, `sampler(denoise, schedule, latents, num_steps) -> latents`.

`denoise(latents [b, h, w, c], timesteps [b]) -> prediction [b, h, w, c]` is the guided denoiser;
`latents` start as standard normal noise. Everything is float32 around the denoiser, and the
trajectory is one `lax.scan`, so a caller's jit compiles it to one program. Each sampler equals the
diffusers scheduler that its docstring names.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from agfsync_jax.diffusion.schedules import Schedule

Denoise = Callable[[Array, Array], Array]
Sampler = Callable[[Denoise, Schedule, Array, int], Array]


def find(name: str) -> Sampler:
    """The sampler called `name`; ValueError that lists them all if there is none."""
    functions = {
        key: value
        for key, value in globals().items()
        if inspect.isfunction(value)
        and list(inspect.signature(value).parameters)[:2] == ["denoise", "schedule"]
    }
    if name not in functions:
        raise ValueError(f"Unknown sampler {name!r}; there are: {', '.join(sorted(functions))}.")
    return functions[name]


def ddim(
    denoise: Denoise, schedule: Schedule, latents: Float[Array, "b h w c"], num_steps: int
) -> Float[Array, "b h w c"]:
    """DDIM with eta = 0 (arXiv:2010.02502, eq. 12): diffusers' DDIMScheduler."""
    timesteps = np.round(schedule.timesteps(num_steps, spacing="leading")).astype(np.int32)
    previous = timesteps - schedule.num_train_timesteps // num_steps
    alphas = schedule.alphas_cumprod[timesteps]
    alphas_previous = np.where(
        previous >= 0,
        schedule.alphas_cumprod[np.maximum(previous, 0)],
        np.float32(schedule.final_alpha_cumprod),
    )

    def step(latents, coefficients):
        timestep, alpha, alpha_previous = coefficients
        prediction = denoise(latents, jnp.full(latents.shape[:1], timestep)).astype(jnp.float32)
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        if schedule.prediction_type == "epsilon":
            clean, noise = (latents - sigma * prediction) / signal, prediction
        elif schedule.prediction_type == "v_prediction":
            clean, noise = (
                signal * latents - sigma * prediction,
                signal * prediction + sigma * latents,
            )
        else:
            clean, noise = prediction, (latents - signal * prediction) / sigma
        if schedule.clip_sample_range is not None:
            clean = jnp.clip(clean, -schedule.clip_sample_range, schedule.clip_sample_range)
        return jnp.sqrt(alpha_previous) * clean + jnp.sqrt(1 - alpha_previous) * noise, None

    tables = (jnp.asarray(timesteps), jnp.asarray(alphas), jnp.asarray(alphas_previous))
    return jax.lax.scan(step, latents.astype(jnp.float32), tables)[0]


def euler(
    denoise: Denoise, schedule: Schedule, latents: Float[Array, "b h w c"], num_steps: int
) -> Float[Array, "b h w c"]:
    """Euler's method in sigma: diffusers' EulerDiscreteScheduler.

    arXiv:2206.00364, algorithm 2, without churn.
    """
    spacing = schedule.timestep_spacing or "linspace"
    timesteps = schedule.timesteps(num_steps, spacing=spacing)
    alphas = schedule.alphas_cumprod.astype(np.float64)
    if schedule.zero_terminal_snr:
        alphas[-1] = 2.0**-24  # keeps the first sigma finite
    sigmas = np.interp(timesteps, np.arange(len(alphas)), np.sqrt((1 - alphas) / alphas))
    largest = sigmas[0]
    # diffusers takes the start as pure noise where the trajectory begins at the last timestep.
    start = largest if spacing in ("linspace", "trailing") else np.sqrt(largest**2 + 1)

    def step(latents, coefficients):
        timestep, sigma, sigma_next = coefficients
        scale = jnp.sqrt(sigma**2 + 1)
        prediction = denoise(latents / scale, jnp.full(latents.shape[:1], timestep)).astype(
            jnp.float32
        )
        if schedule.prediction_type == "epsilon":
            clean = latents - sigma * prediction
        elif schedule.prediction_type == "v_prediction":
            clean = latents / scale**2 - prediction * (sigma / scale)
        else:
            clean = prediction
        return latents + (latents - clean) / sigma * (sigma_next - sigma), None

    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    tables = (
        jnp.asarray(timesteps, jnp.float32),
        jnp.asarray(sigmas[:-1]),
        jnp.asarray(sigmas[1:]),
    )
    return jax.lax.scan(step, latents.astype(jnp.float32) * np.float32(start), tables)[0]
