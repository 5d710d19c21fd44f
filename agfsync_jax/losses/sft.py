"""Supervised fine-tuning on the chosen images: DDPM's simple loss (arXiv:2006.11239, eq. 14).

Unlike Diffusion-DPO, it learns nothing from the rejected and has neither a reference nor a beta.
"""

from jaxtyping import Array, Float

uses_reference = False
same_noise = True
uses_products = False
is_listwise = False
is_batchwise = False


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"] | None = None,
    reference_chosen: Float[Array, " b"] | None = None,
    reference_rejected: Float[Array, " b"] | None = None,
    *,
    beta: float = 0.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Per-pair loss [b]: the policy's error on the chosen image; nothing else plays a part."""
    del policy_rejected, reference_chosen, reference_rejected, beta
    return policy_chosen, {}
