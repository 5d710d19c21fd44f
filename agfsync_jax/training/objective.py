"""Preferences as an objective: residuals of policy and reference, and a loss of them.

The images of an example, a pair or a ranking, share a timestep and, as Diffusion-DPO has it
(arXiv:2311.12908, eq. 14), their noise.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import Loss, Residuals

NUM_BINS = 10  # of timesteps, in which errors are told apart


def draw_noise(
    seed: int,
    step: Array,
    example: Int[Array, " b"],
    shape: tuple[int, ...],
    num_timesteps: int,
    copies: int = 1,
) -> tuple[Float[Array, "b copies ..."], Int[Array, " b"]]:
    """Noise [b, copies, *shape] and timesteps [b]; a row depends on (seed, step, example)."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(example):
        noise_key, time_key = jax.random.split(jax.random.fold_in(step_key, example))
        keys = [noise_key, *(jax.random.fold_in(noise_key, i) for i in range(1, copies))]
        timestep = jax.random.randint(time_key, (), 0, num_timesteps)
        return jnp.stack([jax.random.normal(key, shape) for key in keys]), timestep

    return jax.vmap(draw)(example)


def preference_loss(
    policy: Any,
    reference: Any,
    batch: Mapping[str, Any],
    *,
    loss: Loss,
    denoise: Callable[[Any, Array, Array, Any], Array],
    schedule: Schedule,
    seed: int,
    step: Array,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a batch, and metrics.

    All images go through the denoiser as one batch, and once more with the reference if the loss
    has one.

    Args:
        policy, reference: what `denoise` takes first.
        batch: latents [b, k, h, w, c] (chosen, then rejected; or a ranking), example int [b],
            conditioning, a pytree of arrays [b, ...]; of rankings scores and mask [b, k] too.
        denoise: (parameters, latents, timesteps, conditioning) -> prediction.
        seed, step: of noise and timesteps.

    Returns:
        The loss, and scalars that are means over the batch; "error_by_time" and "count_by_time"
        [NUM_BINS] are sums over the images that are chosen, or first, by timestep.
    """
    latents = batch["latents"]
    b, k, *shape = latents.shape
    copies = 1 if loss.same_noise else k
    noise, timesteps = draw_noise(
        seed, step, batch["example"], tuple(shape), schedule.num_train_timesteps, copies
    )

    def rows(x):
        # Example by example: with a sharded batch all rows of one then stay on its device.
        return x.reshape(b * k, *x.shape[2:])

    def each(x):
        return rows(jnp.broadcast_to(x[:, None], (b, k, *x.shape[1:])))

    noise, times = rows(jnp.broadcast_to(noise, latents.shape)), each(timesteps)
    noisy = schedule.add_noise(rows(latents), noise, times)
    target = schedule.target(rows(latents), noise, times)
    conditioning = jax.tree.map(each, batch["conditioning"])

    def residual(params):
        prediction = denoise(params, noisy, times, conditioning).astype(jnp.float32)
        return (prediction - target).reshape(latents.shape)

    residuals = Residuals(
        residual(policy),
        residual(reference) if loss.uses_reference else None,
        batch.get("scores"),
        batch.get("mask"),
    )
    values, metrics = loss(residuals)
    errors = residuals.policy_errors
    metrics = {name: jnp.mean(value) for name, value in metrics.items()}
    metrics |= {"loss": jnp.mean(values), "chosen_error": jnp.mean(errors[:, 0])}
    if not loss.is_listwise:
        metrics["rejected_error"] = jnp.mean(errors[:, 1])
    bins = timesteps * NUM_BINS // schedule.num_train_timesteps
    metrics["error_by_time"] = jax.ops.segment_sum(errors[:, 0], bins, NUM_BINS)
    metrics["count_by_time"] = jax.ops.segment_sum(jnp.ones(b), bins, NUM_BINS)
    return metrics["loss"], metrics
