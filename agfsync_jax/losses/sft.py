"""Supervised fine-tuning on the chosen images: DDPM's simple loss (arXiv:2006.11239, eq. 14).

Unlike Diffusion-DPO, it learns nothing from the rejected and has neither a reference nor a beta.
"""

from jaxtyping import Array, Float

from agfsync_jax.losses import Loss


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Per-pair loss [b]: the policy's error on the chosen image; nothing else plays a part."""
    del policy_rejected
    return policy_chosen, {}


LOSS = Loss(loss, uses_reference=False)
