"""DSPO, direct score preference optimization (Zhu et al., ICLR 2025,
openreview.net/forum?id=xyfb9HHvMe), as its released code has it for Stable Diffusion 1.5
(huaishengzhu/DSPO, train.py). Its SDXL branch minimizes something else, which is not here.

Unlike Diffusion-DPO, it is a regression on the chosen image alone, whose target is moved on along
what the policy has learned, by a share that shrinks as the pair is told apart.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, pair_errors, reward, reward_metrics


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    chosen_product: Float[Array, " b"],
    *,
    beta: float = 0.001,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = mean over elements of (a - c (a - r))^2, with a and r the residuals of policy and
    reference on the chosen, and c = beta (1 - sigmoid(margin)), margin as in Diffusion-DPO. As in
    the code, the gradient flows through c, too. chosen_product is the mean of a r.

    Beta is a share of a residual: 0.001 in the code, searched in {0.001, 0.01, 0.05}. With c so
    small, nearly all of the loss is the error on the chosen, as in sft.
    """
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    share = beta * jax.nn.sigmoid(rejected - chosen)  # 1 - sigmoid(x) = sigmoid(-x)
    # The square of (1 - c) a + c r, term by term.
    kept = 1 - share
    result = jnp.square(kept) * policy_chosen + 2 * kept * share * chosen_product
    result += jnp.square(share) * reference_chosen
    return result, reward_metrics(chosen, rejected)


LOSS = Loss(
    loss,
    inputs=lambda r: (*pair_errors(r), r.products[:, 0]),
    scales_rewards=False,  # beta is a share, too
)
