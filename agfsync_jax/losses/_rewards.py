"""The implicit reward of Diffusion-DPO, which most losses build on, and its metrics."""

from jaxtyping import Array, Float


def reward(
    policy: Float[Array, "..."], reference: Float[Array, "..."], beta: float
) -> Float[Array, "..."]:
    """-beta/2 (policy error - reference error).

    The errors are means over a latent's elements, and T * weight(t) of arXiv:2311.12908, eq. 14, is
    folded into beta: hence values in the thousands, 2000 for Stable Diffusion 1.5 and 5000 for
    SDXL.
    """
    return -0.5 * beta * (policy - reference)


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
