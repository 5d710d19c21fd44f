"""DGPO, direct group preference optimization (Luo et al., arXiv:2510.08425), on lists of
candidates, as Flow-Factory has it without its masks.

Unlike Diffusion-DPO, it learns from all candidates of a prompt at once, each by how far its score
is above or below the others', and a group, not a pair, is left alone once it is told apart. For two
candidates it is Diffusion-DPO but for a factor of 1 / beta: gradients are small, which AdamW evens
out, and `config.train.max_grad_norm` never clips.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from agfsync_jax.losses import Loss, group_advantages, masked_mean, ranking_metrics, reward


def loss(
    policy: Float[Array, "b n"],
    reference: Float[Array, "b n"],
    scores: Float[Array, "b n"],
    mask: Bool[Array, "b n"],
    *,
    beta: float = 2000.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, "..."]]]:
    """loss = w mean_i(A_i L_i), with L the policy's denoising errors and A the scores less their
    mean, in units of their standard deviation. w = sigmoid(beta mean_i(A_i (L_i - L_ref,i))), which
    has no gradient, is near 1 while the group is in the wrong order and 0 once it is told apart.
    There is no candidate where mask is False; a group of equal scores teaches nothing.

    Beta as in Diffusion-DPO (2000 for Stable Diffusion 1.5, 5000 for SDXL), so that two candidates
    agree with it; Flow-Factory has 10 to 100 for a frozen reference, 2000 to 5000 for a moving one.

    Metrics: of best against worst [b]; rewards/accuracy of all pairs of the batch, a scalar;
    rewards/equal_groups, the share of groups whose scores are equal.
    """
    advantages = group_advantages(scores, mask)
    apart = masked_mean(advantages * (policy - reference), mask)
    weight = jax.lax.stop_gradient(jax.nn.sigmoid(beta * apart))

    metrics = ranking_metrics(reward(policy, reference, beta), scores, mask)
    metrics["rewards/equal_groups"] = jnp.mean(jnp.all(advantages == 0, axis=1))
    return weight * masked_mean(advantages * policy, mask), metrics


# As in its code, the images of a group share their noise.
LOSS = Loss(
    loss,
    inputs=lambda r: (r.policy_errors, r.reference_errors, r.scores, r.mask),
    is_listwise=True,
)
