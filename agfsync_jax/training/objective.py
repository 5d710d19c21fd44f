"""Preferences as an objective: residuals of policy and reference, and a loss of them.

The images of an example, a pair or a ranking, share a timestep and, as Diffusion-DPO has it
(arXiv:2311.12908, eq. 14), their noise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import Loss, Residuals
from agfsync_jax.utils import modules

NUM_BINS = 10  # of timesteps, in which errors are told apart


def load_loss(name: str, settings: Mapping[str, Any]) -> Loss:
    """The loss of a file, with settings of its own.

    A beta of one loss means nothing to another (Diffusion-DPO's are thousands, MaPO's a tenth): in
    a config each loss has a block, config.loss.diffusion_dpo.beta, and the others' are not read.

    Raises:
        ValueError: no such loss; a setting that it does not have, or a value that it does not take.
    """
    return modules.load("losses", name).LOSS.configured(**settings)


class Noising(NamedTuple):
    """Which noise is learned, and how much each timestep counts; as in `config.train`."""

    timesteps: str = ""  # see `timesteps_of`
    noise_offset: float = 0.0  # standard deviation of a constant of each channel, beside the noise
    min_snr_gamma: float = 0.0  # arXiv:2303.09556: errors count min(SNR, gamma) / SNR; 0: alike


ALL_NOISE = Noising()


def timesteps_of(text: str, num_train_timesteps: int) -> Sequence[int]:
    """The timesteps that `config.train.timesteps` names: "FIRST:END", a list, or "" for all.

    Raises:
        ValueError: none, or one that the schedule does not have.
    """
    first, colon, end = text.partition(":")
    if colon:
        found: Sequence[int] = range(int(first), int(end))
    else:
        found = [int(each) for each in text.split(",")] if text else range(num_train_timesteps)
    if not found or max(found) >= num_train_timesteps:
        raise ValueError(
            f"config.train.timesteps={text!r}: expected some of 0 to {num_train_timesteps - 1},"
            " those of the checkpoint's noise schedule."
        )
    return found


def draw_noise(
    seed: int,
    step: Array,
    example: Int[Array, " b"],
    shape: tuple[int, ...],
    timesteps: Sequence[int],
    copies: int = 1,
    offset: float = 0.0,
) -> tuple[Float[Array, "b copies ..."], Int[Array, " b"]]:
    """Noise [b, copies, *shape] and one of the timesteps each [b]; a row depends on (seed, step,
    example)."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(example):
        noise_key, time_key = jax.random.split(jax.random.fold_in(step_key, example))
        keys = [noise_key, *(jax.random.fold_in(noise_key, i) for i in range(1, copies))]
        place = jax.random.randint(time_key, (), 0, len(timesteps))
        noise = jnp.stack([_normal(key, shape, offset) for key in keys])
        return noise, jnp.array(timesteps)[place]

    return jax.vmap(draw)(example)


def _normal(key: Array, shape: tuple[int, ...], offset: float) -> Float[Array, "..."]:
    if not offset:
        return jax.random.normal(key, shape)
    key, level_key = jax.random.split(key)
    level = jax.random.normal(level_key, (*[1] * (len(shape) - 1), shape[-1]))
    return jax.random.normal(key, shape) + offset * jnp.broadcast_to(level, shape)


def time_weights(schedule: Schedule, gamma: float) -> np.ndarray:
    """What a squared error counts at each timestep, float32 [num_train_timesteps]."""
    alphas = schedule.alphas_cumprod.astype(np.float64)
    snr = alphas / (1 - alphas)
    # The error of v is that of noise times (SNR + 1) / SNR.
    whole = snr + 1 if schedule.prediction_type == "v_prediction" else snr
    if schedule.prediction_type == "sample":
        whole = np.ones_like(snr)
    return (np.minimum(snr, gamma) / whole).astype(np.float32)


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
    noising: Noising = ALL_NOISE,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of a batch, and metrics.

    All images go through the denoiser as one batch, and once more with the reference if the loss
    has one.

    Args:
        policy, reference: what `denoise` takes first.
        batch: latents [b, k, h, w, c] (chosen, then rejected; or a ranking), example int [b],
            noise [b, k, h, w, c] and timesteps int [b] where they are not drawn;
            conditioning, a pytree of arrays [b, ...], and reference_conditioning if the reference
            has another one; of rankings scores and mask [b, k] too, and scores [b, 2] of pairs if
            the loss uses them.
        denoise: (parameters, latents, timesteps, conditioning) -> prediction.
        seed, step: of noise and timesteps.
        noising: which of it is learned.

    Returns:
        The loss, and scalars that are means over the batch; "error_by_time" and "count_by_time"
        [NUM_BINS] are sums over the images that are chosen, or first, by timestep.
    """
    latents = batch["latents"]
    b, k, *shape = latents.shape
    copies = 1 if loss.same_noise else k
    possible = timesteps_of(noising.timesteps, schedule.num_train_timesteps)
    if "noise" in batch:
        noise, drawn = batch["noise"], batch["timesteps"]
    else:
        noise, drawn = draw_noise(
            *(seed, step, batch["example"], tuple(shape), possible, copies, noising.noise_offset)
        )

    def rows(x):
        # Example by example: with a sharded batch all rows of one then stay on its device.
        return x.reshape(b * k, *x.shape[2:])

    def each(x):
        return rows(jnp.broadcast_to(x[:, None], (b, k, *x.shape[1:])))

    noise, times = rows(jnp.broadcast_to(noise, latents.shape)), each(drawn)
    noisy = schedule.add_noise(rows(latents), noise, times)
    target = schedule.target(rows(latents), noise, times)
    conditioning = jax.tree.map(each, batch["conditioning"])
    of_reference = conditioning
    if "reference_conditioning" in batch:
        of_reference = jax.tree.map(each, batch["reference_conditioning"])

    def residual(params, conditioning):
        prediction = denoise(params, noisy, times, conditioning).astype(jnp.float32)
        return (prediction - target).reshape(latents.shape)

    residuals = Residuals(
        residual(policy, conditioning),
        residual(reference, of_reference) if loss.uses_reference else None,
        batch.get("scores"),
        batch.get("mask"),
        schedule.clean_scale(drawn),
    )
    errors = residuals.policy_errors
    divergence = residuals.divergence if loss.uses_reference else None
    if noising.min_snr_gamma:
        weights = jnp.asarray(time_weights(schedule, noising.min_snr_gamma))[drawn]
        roots = jnp.sqrt(weights).reshape(b, *[1] * (latents.ndim - 1))  # of what will be squared
        found = (each if each is None else each * roots for each in residuals[:2])
        residuals = Residuals(*found, *residuals[2:])
    values, metrics = loss(residuals)
    metrics = {name: jnp.mean(value) for name, value in metrics.items()}
    metrics |= {"loss": jnp.mean(values), "chosen_error": jnp.mean(errors[:, 0])}
    if loss.uses_reference:
        metrics["divergence"] = jnp.mean(divergence)
    if not loss.is_listwise:
        metrics["rejected_error"] = jnp.mean(errors[:, 1])
    bins = drawn * NUM_BINS // schedule.num_train_timesteps
    metrics["error_by_time"] = jax.ops.segment_sum(errors[:, 0], bins, NUM_BINS)
    metrics["count_by_time"] = jax.ops.segment_sum(jnp.ones(b), bins, NUM_BINS)
    return metrics["loss"], metrics
