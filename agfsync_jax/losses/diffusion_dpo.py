"""Diffusion-DPO (Wallace et al., arXiv:2311.12908, eq. 14).

The policy learns to denoise the chosen image better, and the rejected one worse, than the reference
does. The paper's T * weight(t) is folded into beta and the squared norm is a mean over elements, as
in its released code (SalesforceAIResearch/DiffusionDPO, train.py). It holds for epsilon and
v-prediction alike: errors are taken at the model's own target.
"""

import jax
from jaxtyping import Array, Float

from agfsync_jax.losses._rewards import reward_metrics, rewards

uses_reference = True
same_noise = True
uses_products = False
is_listwise = False
is_batchwise = False


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    *,
    beta: float = 2000.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Per-pair loss and metrics from denoising errors (mean over a latent's elements), all [b].

    loss = -log sigmoid(margin), margin = chosen - rejected reward, reward = -beta/2 (policy error -
    reference error): ln 2 where policy and reference are equal. Paper: beta 2000 for Stable
    Diffusion 1.5, 5000 for SDXL; its code has 5000 for both.
    """
    errors = policy_chosen, policy_rejected, reference_chosen, reference_rejected
    chosen, rejected = rewards(*errors, beta)
    return -jax.nn.log_sigmoid(chosen - rejected), reward_metrics(chosen, rejected)
