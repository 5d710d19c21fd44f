"""SmPO, smoothed preference optimization (Lu et al., arXiv:2506.02698, eq. 9), as its released code
has it (JaydenLyh/SmPO, train.py) but for its noise, which is drawn here, not found by inversion.

Unlike Diffusion-DPO, a label is as strong as the scores of the two images are apart: nothing is
learned of two that are equally good, and much of two that are not.
"""

import jax
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, pair_errors, reward, reward_metrics


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    scores: Float[Array, "b 2"],
    *,
    beta: float = 2000.0,
    gamma: float = 1.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = -log sigmoid(margin), margin and beta as in Diffusion-DPO but with a beta for each
    pair, (2 alpha - gamma) beta: alpha / gamma = softmax(scores) of the chosen, so that the factor
    goes from 0, for equal scores, to gamma. Beta: 2000 for Stable Diffusion 1.5, 5000 for SDXL.

    Scores are those that made the pairs, of `config.pair.weights`. Gamma is 10 in the paper, whose
    scores are shifted and scaled to 0..1 over all images and seldom differ by 0.1; sums of z-scores
    (`config.pair.normalize`) differ by units, and 1 makes the surest pairs those of Diffusion-DPO.

    Metrics: those of the rewards, and labels/strength, the factor.

    Raises:
        ValueError: gamma is not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}, expected more than 0. Set config.loss.smpo.gamma.")
    alpha = gamma * jax.nn.softmax(scores, axis=1)[:, 0]
    strength = 2 * alpha - gamma
    chosen = reward(policy_chosen, reference_chosen, beta * strength)
    rejected = reward(policy_rejected, reference_rejected, beta * strength)
    metrics = reward_metrics(chosen, rejected) | {"labels/strength": strength}
    return -jax.nn.log_sigmoid(chosen - rejected), metrics


LOSS = Loss(loss, inputs=lambda r: (*pair_errors(r), r.scores), uses_scores=True)
