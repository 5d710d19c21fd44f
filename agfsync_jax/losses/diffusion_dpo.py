"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14).

The policy learns to denoise the chosen image better, and the rejected one worse, than the reference
does. The paper's T * weight(t) is folded into beta and the squared norm is a mean over elements, as
in its released code (SalesforceAIResearch/DiffusionDPO, train.py). It holds for epsilon and
v-prediction alike: errors are taken at the model's own target.
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
    beta: float = 2000.0,
    margin_cap: float = 0.0,
    anchor: float = 0.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = -log sigmoid(margin), margin = chosen - rejected reward, reward = -beta/2 (policy
    error - reference error): ln 2 where policy and reference are equal. Paper: beta 2000 for
    Stable Diffusion 1.5, 5000 for SDXL; its code has 5000 for both.

    Two guards that practice has added, neither the paper's. margin_cap: a margin counts as that at
    most, so that a pair beyond it is left alone; 0: none. anchor: + anchor max(0, -chosen reward),
    a price for denoising the chosen worse than the reference does. It is in units of beta / 2, as
    the reward is: at 1, what the chosen loses counts twice or more. (DPOP, arXiv:2402.13228, has
    the same term within the sigmoid.)
    """
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    margin = jnp.minimum(chosen - rejected, margin_cap) if margin_cap else chosen - rejected
    result = -jax.nn.log_sigmoid(margin)
    if anchor:
        result += anchor * jax.nn.relu(-chosen)
    return result, reward_metrics(chosen, rejected)


LOSS = Loss(loss)
