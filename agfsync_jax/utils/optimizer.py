"""The optimizer of `config.train`: AdamW with warm-up, after clipping by global norm."""

import optax


def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    schedule: str = "constant",
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (arXiv:1711.05101; beta 0.9 and 0.999, epsilon 1e-8) and its learning rate by step.

    Args:
        learning_rate: after the warm-up, which is linear. The first step already learns: a warm-up
            of n steps begins at 1/(n+1) of the learning rate.
        num_steps: where a cosine schedule reaches zero.
        schedule: constant | cosine, after the warm-up.
        weight_decay: decoupled, on all parameters, in units of the learning rate.
        max_grad_norm: gradients of a larger global norm are scaled down to it.

    Raises:
        ValueError: an unknown schedule, a warm-up as long as the cosine schedule, a norm that
            leaves nothing of the gradients.
    """
    if max_grad_norm <= 0:
        raise ValueError(f"train.max_grad_norm={max_grad_norm}: expected a positive number.")
    start = learning_rate / (warmup_steps + 1)
    if schedule == "constant":
        rate = optax.warmup_constant_schedule(start, learning_rate, warmup_steps)
    elif schedule == "cosine":
        if warmup_steps >= num_steps:
            raise ValueError(
                f"train.warmup_steps={warmup_steps} leaves nothing of the cosine schedule: it must "
                f"be below train.num_steps={num_steps}."
            )
        rate = optax.warmup_cosine_decay_schedule(start, learning_rate, warmup_steps, num_steps)
    else:
        raise ValueError(f"train.schedule={schedule!r}: expected constant | cosine.")
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw), rate
