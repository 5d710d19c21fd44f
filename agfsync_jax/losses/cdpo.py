"""Conservative DPO (E. Mitchell, "A note on DPO with noisy preferences & relationship to IPO",
2023): Diffusion-DPO with label smoothing.

Unlike Diffusion-DPO, it takes a share of the labels to be wrong, and so stops widening a margin at
log((1 - label_smoothing) / label_smoothing) instead of never.
"""

import jax
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, reward, reward_metrics


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    *,
    beta: float = 2000.0,
    label_smoothing: float = 0.1,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), with s = label_smoothing, the
    probability that chosen and rejected are swapped. Margin and beta as in Diffusion-DPO (2000 for
    Stable Diffusion 1.5, 5000 for SDXL); s = 0 is Diffusion-DPO.

    Raises:
        ValueError: label_smoothing is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, expected at least 0 and less than 0.5: at 0.5 "
            "the labels say nothing. Set config.loss.cdpo.label_smoothing."
        )
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    right = jax.nn.log_sigmoid(chosen - rejected)
    swapped = jax.nn.log_sigmoid(rejected - chosen)
    result = -(1 - label_smoothing) * right - label_smoothing * swapped
    return result, reward_metrics(chosen, rejected)


LOSS = Loss(loss)
