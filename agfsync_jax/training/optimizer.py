"""The optimizer of `config.train`: AdamW, Adafactor or Lion with warm-up, after clipping."""

from collections.abc import Mapping
from typing import Any

import optax


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    optimizer: str = "adamw",
    warmup_steps: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    momentum_dtype: str = "float32",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate by step.

    Args:
        learning_rate: after the warm-up, which is linear. The first step already learns: a warm-up
            of n steps begins at 1/(n+1) of the learning rate.
        num_steps: where a cosine schedule reaches zero.
        optimizer: adamw (arXiv:1711.05101; beta 0.9 and 0.999, epsilon 1e-8); adafactor
            (arXiv:1804.04235, without momentum: what Diffusion-DPO trains SDXL with; its memory is
            that of rows and columns); lion (arXiv:2302.06675; beta 0.9 and 0.99, wants a learning
            rate 3 to 10 times smaller than adamw).
        warmup_steps: see `learning_rate`.
        schedule: constant | cosine, after the warm-up.
        weight_decay: decoupled, on all parameters, in units of the learning rate.
        max_grad_norm: gradients of a larger global norm are scaled down to it; 0: none are.
        momentum_dtype: of the first moment. bfloat16 saves 2 bytes a parameter; the second moment
            is float32 always, as its steps of a thousandth would be lost in bfloat16.

    Raises:
        ValueError: an unknown name, a warm-up as long as the cosine schedule, a negative norm.
    """
    for key, value, known in (
        ("optimizer", optimizer, ("adamw", "adafactor", "lion")),
        ("schedule", schedule, ("constant", "cosine")),
        ("momentum_dtype", momentum_dtype, ("float32", "bfloat16")),
    ):
        if value not in known:
            raise ValueError(f"train.{key}={value!r}: expected {' | '.join(known)}.")
    if max_grad_norm < 0:
        raise ValueError(f"train.max_grad_norm={max_grad_norm}: expected 0 or a positive number.")
    start = learning_rate / (warmup_steps + 1)
    if schedule == "constant":
        rate = optax.warmup_constant_schedule(start, learning_rate, warmup_steps)
    else:
        if warmup_steps >= num_steps:
            raise ValueError(
                f"train.warmup_steps={warmup_steps} leaves nothing of the cosine schedule: it must "
                f"be below train.num_steps={num_steps}."
            )
        rate = optax.warmup_cosine_decay_schedule(start, learning_rate, warmup_steps, num_steps)
    if optimizer in ("adamw", "lion"):
        make = getattr(optax, optimizer)
        update = make(rate, weight_decay=weight_decay, mu_dtype=momentum_dtype)
    else:
        # Decay in units of the learning rate, as the others; optax's own is of the parameters.
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    if max_grad_norm:
        update = optax.chain(optax.clip_by_global_norm(max_grad_norm), update)
    return update, rate


def with_lora_alpha(
    optimizer: optax.GradientTransformation, ratio: float
) -> optax.GradientTransformation:
    """The optimizer of LoRA adapters {name: {"A", "B"}} whose product counts alpha / rank, `ratio`.

    Elsewhere, as in PEFT and kohya's scripts, that is a factor on the product. Here A @ B is what
    is added to a kernel, and the factor is within B: the optimizer sees B and its gradient as it
    would see them there.
    """

    def scaled(adapters: Mapping[str, Any], by: float) -> dict[str, Any]:
        return {name: {**pair, "B": by * pair["B"]} for name, pair in adapters.items()}

    def init(params):
        return optimizer.init(scaled(params, 1 / ratio))

    def update(grads, state, params):
        grads, params = scaled(grads, ratio), scaled(params, 1 / ratio)
        updates, state = optimizer.update(grads, state, params)
        return scaled(updates, ratio), state

    return optax.GradientTransformation(init, update)
