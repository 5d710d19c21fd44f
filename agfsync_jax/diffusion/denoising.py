"""Guidance: what samplers see of a denoiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def guide(
    denoise: Callable[[Array, Array, Any], Array],
    conditioning: Any,
    unconditional: Any,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Callable[[Array, Array], Array]:
    """Classifier-free guidance (arXiv:2207.12598, eq. 6) as one batch of 2 b rows.

    Args:
        denoise: (latents [b, ...], timesteps [b], conditioning) -> prediction [b, ...].
        conditioning, unconditional: pytrees of arrays [b, ...] alike.
        guidance_scale: 1 means no guidance: the unconditional half is not computed.
        guidance_rescale: how far, from 0 to 1, a guided prediction's standard deviation over a row
            is drawn back to that of the conditional one (arXiv:2305.08891, eqs. 15 and 16).

    Returns:
        (latents [b, ...], timesteps [b]) -> guided prediction [b, ...].
    """
    if guidance_scale == 1:
        return lambda latents, timesteps: denoise(latents, timesteps, conditioning)

    def double(first, second):
        # Row by row, not half by half: with a sharded batch both rows then stay on their device.
        return jnp.stack([first, second], axis=1).reshape((-1,) + first.shape[1:])

    both = jax.tree.map(double, unconditional, conditioning)

    def guided(latents, timesteps):
        predictions = denoise(double(latents, latents), double(timesteps, timesteps), both)
        predictions = predictions.reshape((-1, 2) + latents.shape[1:]).astype(jnp.float32)
        first, second = predictions[:, 0], predictions[:, 1]
        result = first + guidance_scale * (second - first)
        if guidance_rescale:
            axes = tuple(range(1, result.ndim))
            wanted, found = (jnp.std(x, axes, ddof=1, keepdims=True) for x in (second, result))
            result *= guidance_rescale * wanted / found + (1 - guidance_rescale)
        return result

    return guided
