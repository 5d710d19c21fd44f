"""The implicit reward of Diffusion-DPO, which most losses build on.

reward = -beta/2 (policy error - reference error). The errors are means over a latent's elements,
and T * weight(t) of arXiv:2311.12908, eq. 14, is folded into beta: hence values in the thousands,
2000 for Stable Diffusion 1.5 and 5000 for SDXL.
"""

from jaxtyping import Array, Float


def rewards(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    beta: float,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Rewards of the chosen and the rejected [b] each, from errors [b]."""
    chosen = -0.5 * beta * (policy_chosen - reference_chosen)
    rejected = -0.5 * beta * (policy_rejected - reference_rejected)
    return chosen, rejected


def reward_metrics(
    chosen: Float[Array, "..."], rejected: Float[Array, "..."]
) -> dict[str, Float[Array, "..."]]:
    """The metrics of every loss with a reference, in the shape of the rewards."""
    margin = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/accuracy": (margin > 0).astype(margin.dtype),
    }
