"""RankDPO (Karthik et al., arXiv:2410.18013, eqs. 5 to 7 and algorithm 2): lists of candidates.

Unlike Diffusion-DPO, every pair of a list counts, by how far apart its two are and most at the top:
weight_ij = |gain_i - gain_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, divided by no ideal DCG.
gain = 2^wins - 1, where wins is the share of the other candidates that one beats (the paper's
algorithm 1 with one reward model): the scale of scores does not matter. Rank 1 is the best score;
figure 2 of the paper shows predicted ranks, but its algorithm takes these. Equals share a rank.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from agfsync_jax.losses import Loss, better_pairs, ranking_metrics, reward


def loss(
    policy: Float[Array, "b n"],
    reference: Float[Array, "b n"],
    scores: Float[Array, "b n"],
    mask: Bool[Array, "b n"],
    *,
    beta: float = 2000.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, "..."]]]:
    """Per-list loss [b] and metrics from denoising errors, scores (more is better) and mask [b n].

    loss = -sum over pairs, i better than j, of weight_ij log sigmoid(reward_i - reward_j), with
    reward and beta as in Diffusion-DPO (2000 for Stable Diffusion 1.5, 5000 for SDXL; the paper
    leaves out the half and gives no value). There is no candidate where mask is False.

    Metrics: of best against worst [b]; rewards/accuracy of all pairs of the batch, a scalar.
    """
    rewards = jnp.where(mask, reward(policy, reference, beta), 0)
    better = better_pairs(scores, mask)  # [b i j]
    others = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True) - 1, 1)
    gain = jnp.exp2(jnp.sum(better, axis=2) / others) - 1
    discount = 1 / jnp.log(2.0 + jnp.sum(better, axis=1))  # rank = 1 + how many are better
    gains, discounts = (jnp.abs(x[:, :, None] - x[:, None, :]) for x in (gain, discount))
    margin = rewards[:, :, None] - rewards[:, None, :]
    pairs = jnp.where(better, -gains * discounts * jax.nn.log_sigmoid(margin), 0)
    return jnp.sum(pairs, axis=(1, 2)), ranking_metrics(rewards, scores, mask)


# Candidates share their noise, as in Diffusion-DPO's code; the paper draws one for each.
LOSS = Loss(
    loss,
    inputs=lambda r: (r.policy_errors, r.reference_errors, r.scores, r.mask),
    is_listwise=True,
)
