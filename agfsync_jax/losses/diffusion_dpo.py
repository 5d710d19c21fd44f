"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14).

The policy learns to denoise the chosen image better, and the rejected one worse, than the reference
does. The paper's T * weight(t) is folded into beta, as in its released code (beta 2000 to 5000).
"""

import jax
from jaxtyping import Array, Float

uses_reference = True


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    *,
    beta: float,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Per-pair loss and metrics from denoising errors (mean over a latent's elements), all [b].

    loss = -log sigmoid(margin), margin = chosen - rejected reward, reward = -beta/2 (policy error -
    reference error): ln 2 where policy and reference are equal.
    """
    chosen = -0.5 * beta * (policy_chosen - reference_chosen)
    rejected = -0.5 * beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).astype(margin.dtype),
    }
    return -jax.nn.log_sigmoid(margin), metrics
