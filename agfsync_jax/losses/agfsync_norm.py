"""The loss of AGFSync's released code (Anjingkun/AGFSync, train.py), not that of its paper.

The paper (arXiv:2403.13352) has Diffusion-DPO; the code's comment says it differs for stability.

Unlike Diffusion-DPO, it compares norms, neither squared nor averaged, over the whole batch at once,
and chosen and rejected have noises of their own. Near a mean squared error of m, beta 1 acts like
Diffusion-DPO's sqrt(b num_elements / m): 1145 for 2 pairs of 1024 x 1024 pixels at m = 0.1. It thus
grows with the batch; the code's batch is what one GPU holds (2 pairs), here it is the global one.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, pair_errors, reward_metrics


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    reference_chosen: Float[Array, " b"],
    reference_rejected: Float[Array, " b"],
    num_elements: int,
    *,
    beta: float = 1.0,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, ""]]]:
    """The batch's loss, repeated [b], and scalar metrics, from denoising errors [b].

    loss = -log sigmoid(chosen - rejected), reward = -beta (policy norm - reference norm), where
    the norm is that of the residuals of all b latents, sqrt(num_elements sum(errors)). Beta is per
    unit of that norm: 1 in the code.

    Args:
        num_elements: of one latent, over which its error is the mean.
    """

    def norm(errors):
        square = num_elements * jnp.sum(errors)
        # At zero the slope is taken as zero, as torch.norm does; the inner where keeps NaN out.
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    chosen = -beta * (norm(policy_chosen) - norm(reference_chosen))
    rejected = -beta * (norm(policy_rejected) - norm(reference_rejected))
    value = -jax.nn.log_sigmoid(chosen - rejected)
    return jnp.broadcast_to(value, policy_chosen.shape), reward_metrics(chosen, rejected)


LOSS = Loss(
    loss,
    inputs=lambda r: (*pair_errors(r), math.prod(r.policy.shape[2:])),
    same_noise=False,
    is_batchwise=True,
)
