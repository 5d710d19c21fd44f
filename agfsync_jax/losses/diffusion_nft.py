"""DiffusionNFT, negative-aware fine-tuning (Zheng et al., arXiv:2509.16117), on lists of
candidates, as its released code has it (NVlabs/DiffusionNFT, scripts/train_nft_sd3.py) but for a
second, frozen reference, to which it draws the policy by a weight of 1e-4.

Unlike Diffusion-DPO, no two errors are compared: the policy is drawn to good images, and what lies
as far on the other side of the reference is drawn to bad ones, each as in plain training. The
paper's old policy is the reference, which follows slowly (`config.train.reference_decay`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from agfsync_jax.losses import Loss, group_advantages, masked_mean, ranking_metrics


def loss(
    policy: Float[Array, "b n ..."],
    reference: Float[Array, "b n ..."],
    scale: Float[Array, " b"],
    scores: Float[Array, "b n"],
    mask: Bool[Array, "b n"],
    *,
    beta: float = 1.0,
    max_advantage: float = 5.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, "..."]]]:
    """loss = max_advantage / beta mean_i(r_i E+_i + (1 - r_i) E-_i), from residuals, of
    x+ = beta policy + (1 - beta) reference and x- = (1 + beta) reference - beta policy. r, how good
    an image is, is clip(A / max_advantage / 2 + 1/2, 0, 1), with A the scores less their mean, in
    units of their standard deviation. There is no candidate where mask is False.

    E = mean(x^2) / mean|x|, whose denominator has no gradient and is 1e-5 at least, is of the clean
    image: residuals count by `scale`, sigma for v-prediction as the paper's t for flows, but by 1
    at most. For noise sigma / signal is 14.6 at the end of Stable Diffusion 1.5's schedule, where
    next to nothing of an image is left to learn, and that end would drown the rest.
    `config.train.min_snr_gamma` counts by its root here, as E is no square.

    Beta is how far the two are from the reference: 1 in the code, 0.1 for several rewards; the
    paper's max_advantage is 5.

    Metrics: of best against worst [b], with reward = reference error - policy error;
    rewards/accuracy of all pairs of the batch; rewards/equal_groups, the share of groups whose
    scores are equal; error/positive and error/negative, the means of E.

    Raises:
        ValueError: max_advantage is not above 0.
    """
    if max_advantage <= 0:
        raise ValueError(
            f"max_advantage is {max_advantage}, expected more than 0. Set"
            " config.loss.diffusion_nft.max_advantage."
        )
    axes = tuple(range(2, policy.ndim))
    scale = jnp.minimum(scale, 1).reshape(-1, *[1] * (policy.ndim - 1))
    policy, reference = scale * policy, scale * reference

    def error(residual):
        size = jax.lax.stop_gradient(jnp.mean(jnp.abs(residual), axes))
        return jnp.mean(jnp.square(residual), axes) / jnp.maximum(size, 1e-5)

    positive = error(beta * policy + (1 - beta) * reference)
    negative = error((1 + beta) * reference - beta * policy)
    advantages = group_advantages(scores, mask)
    good = jnp.clip(advantages / max_advantage / 2 + 0.5, 0, 1)
    values = masked_mean(good * positive + (1 - good) * negative, mask) * max_advantage / beta

    rewards = jnp.mean(jnp.square(reference) - jnp.square(policy), axes)
    metrics = ranking_metrics(jnp.where(mask, rewards, 0), scores, mask)
    metrics["rewards/equal_groups"] = jnp.mean(jnp.all(advantages == 0, axis=1))
    metrics["error/positive"] = masked_mean(positive, mask)
    metrics["error/negative"] = masked_mean(negative, mask)
    return values, metrics


# Candidates share their noise, as in Diffusion-DPO's code; the paper draws one for each.
LOSS = Loss(
    loss,
    inputs=lambda r: (r.policy, r.reference, r.scale, r.scores, r.mask),
    is_listwise=True,
    scales_rewards=False,
)
