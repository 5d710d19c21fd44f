"""The hinge loss of SLiC-HF (Zhao et al., arXiv:2305.10425) on DPO's margin (Liu et al.,
arXiv:2309.06657), as diffusers' research script for Diffusion-DPO offers it.

Unlike Diffusion-DPO, a pair whose margin has reached 1 is left alone, and all others pull equally.
"""

import jax
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
    """loss = max(0, 1 - margin); margin and beta as in Diffusion-DPO (2000 for Stable Diffusion
    1.5, 5000 for SDXL). The script leaves out Diffusion-DPO's half: its 2500 is 5000 here.
    """
    chosen = reward(policy_chosen, reference_chosen, beta)
    rejected = reward(policy_rejected, reference_rejected, beta)
    return jax.nn.relu(1 - (chosen - rejected)), reward_metrics(chosen, rejected)


LOSS = Loss(loss)
