"""IPO, identity preference optimization (Azar et al., arXiv:2310.12036, eq. 17), on the log-ratio
of Diffusion-DPO (arXiv:2311.12908, eq. 14).

Unlike Diffusion-DPO, it draws the margin to 1/2 rather than ever further up, so that pairs that are
already told apart do not drive the policy away from the reference.
"""

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
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = (margin - 1/2)^2, with margin = beta h and h the paper's log-ratio: beta^2 times its
    (h - 1/(2 beta))^2, which is 1e-7 at the usual beta and lost in an optimizer's epsilon. Margin
    and beta as in Diffusion-DPO (2000 for Stable Diffusion 1.5, 5000 for SDXL).
    """
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    return jnp.square(chosen - rejected - 0.5), reward_metrics(chosen, rejected)


LOSS = Loss(loss)
