"""Diffusion-KTO (Li et al., arXiv:2404.04465, eq. 8), with the Kahneman-Tversky utility, sigmoid.

Unlike Diffusion-DPO, each image is judged by itself, against the mean reward of the batch: an image
far above or far below that point no longer pulls. The point is taken from the batch itself, as in
the released code (jacklishufan/diffusion-kto, --halo sigmoid, --bce_offset none); the paper wants
unrelated images. Here, desirable and undesirable come as pairs: chosen and rejected.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, reward, reward_metrics


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    *,
    beta: float = 10000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, "..."]]]:
    """loss = mean over the two images of weight (1 - sigmoid(+-(reward - kl))), plus for the
    chosen, where kl = max(0, mean reward of the 2 b images), without a gradient. Reward and beta as
    in Diffusion-DPO; the code leaves out its half: the paper's best beta, 5000, is 10000 here.
    """
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    kl = jax.lax.stop_gradient(jnp.maximum(0.5 * jnp.mean(chosen + rejected), 0))
    desirable = desirable_weight * jax.nn.sigmoid(kl - chosen)  # 1 - sigmoid(x) = sigmoid(-x)
    undesirable = undesirable_weight * jax.nn.sigmoid(rejected - kl)
    return 0.5 * (desirable + undesirable), reward_metrics(chosen, rejected) | {"kl": kl}


LOSS = Loss(loss, is_batchwise=True)
