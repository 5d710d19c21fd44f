"""Preferences as an objective: denoising errors of policy and reference, and a loss of them.

The images of an example, a pair or a ranking, share a timestep and, as Diffusion-DPO has it
(arXiv:2311.12908, eq. 14), their noise.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agfsync_jax.diffusion.schedules import Schedule

NUM_BINS = 10  # of timesteps, in which errors are told apart


class Loss(NamedTuple):
    """A file of losses/ with its settings."""

    function: Callable[..., tuple[Float[Array, " b"], dict[str, Array]]]
    uses_reference: bool
    uses_products: bool
    same_noise: bool
    is_listwise: bool
    takes_num_elements: bool

    @classmethod
    def of(cls, module: ModuleType, **settings: Any) -> "Loss":
        """A beta of 0 is the loss's own.

        Raises:
            ValueError: a setting that the loss does not have.
        """
        known = inspect.signature(module.loss).parameters
        if unknown := sorted(set(settings) - set(known)):
            own = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY]
            raise ValueError(
                f"config.loss has {', '.join(unknown)}, which {module.__name__} does not take: it"
                f" has {', '.join(own)}."
            )
        given = {n: value for n, value in settings.items() if value or n != "beta"}
        return cls(
            functools.partial(module.loss, **given),
            *(getattr(module, name) for name in cls._fields[1:5]),
            takes_num_elements="num_elements" in known,
        )


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
        policy, reference: what `denoise` takes first; the second is None without a reference.
        batch: latents [b, k, h, w, c] (chosen, then rejected; or a ranking), example int [b],
            conditioning, a pytree of arrays [b, ...]; of rankings scores and mask [b, k] too.
        loss: what is made of the errors.
        denoise: (parameters, latents, timesteps, conditioning) -> prediction.
        schedule: the noise schedule.
        seed, step: of noise and timesteps.

    Returns:
        The loss, and scalars that are means over the batch; "error_by_time" and "count_by_time"
        [NUM_BINS] are sums over the images that are chosen, or first, by timestep.
    """
    latents = batch["latents"]
    b, k, *shape = latents.shape
    noise, timesteps = draw_noise(
        seed,
        step,
        batch["example"],
        tuple(shape),
        schedule.num_train_timesteps,
        1 if loss.same_noise else k,
    )
    noise = jnp.broadcast_to(noise, latents.shape)

    def rows(x):
        # Example by example: with a sharded batch all rows of one then stay on its device.
        return x.reshape(b * k, *x.shape[2:])

    def each(x):
        return rows(jnp.broadcast_to(x[:, None], (b, k, *x.shape[1:])))

    conditioning = jax.tree.map(each, batch["conditioning"])
    inputs = rows(latents), rows(noise), each(timesteps)
    noisy, target = schedule.add_noise(*inputs), schedule.target(*inputs)

    def residuals(params):
        prediction = denoise(params, noisy, inputs[2], conditioning).astype(jnp.float32)
        return (prediction - target).reshape(latents.shape)

    def mean(x):
        return jnp.mean(x, axis=tuple(range(2, x.ndim)))  # [b, k]

    own = residuals(policy)
    errors = mean(jnp.square(own))
    others, keywords = None, {}
    if loss.uses_reference:
        fixed = jax.lax.stop_gradient(residuals(reference))
        others = mean(jnp.square(fixed))
        if loss.uses_products:
            products = mean(own * fixed)
            keywords |= {"chosen_product": products[:, 0], "rejected_product": products[:, 1]}
    if loss.takes_num_elements:
        keywords["num_elements"] = latents[0, 0].size
    if loss.is_listwise:
        values, metrics = loss.function(errors, others, batch["scores"], batch["mask"], **keywords)
    else:
        fixed = (others[:, 0], others[:, 1]) if others is not None else (None, None)
        values, metrics = loss.function(errors[:, 0], errors[:, 1], *fixed, **keywords)
    metrics = {name: jnp.mean(value) for name, value in metrics.items()}
    metrics |= {"loss": jnp.mean(values), "chosen_error": jnp.mean(errors[:, 0])}
    if not loss.is_listwise:
        metrics["rejected_error"] = jnp.mean(errors[:, 1])
    bins = timesteps * NUM_BINS // schedule.num_train_timesteps
    metrics["error_by_time"] = jax.ops.segment_sum(errors[:, 0], bins, NUM_BINS)
    metrics["count_by_time"] = jax.ops.segment_sum(jnp.ones(b), bins, NUM_BINS)
    return metrics["loss"], jax.lax.stop_gradient(metrics)
