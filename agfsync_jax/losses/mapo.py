"""MaPO, margin-aware preference optimization (Hong et al., arXiv:2406.06424), as its released code
has it (mapo-t2i/mapo, utils.py: compute_loss). The paper's second version, eqs. 9 to 11, weights
the same two terms by another rule.

Unlike Diffusion-DPO, there is no reference, which saves its forward passes and its memory: the
error on the chosen keeps the policy in place, and a bounded likelihood is compared, not a ratio.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agfsync_jax.losses import Loss, accuracy


def loss(
    policy_chosen: Float[Array, " b"],
    policy_rejected: Float[Array, " b"],
    *,
    beta: float = 0.1,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """loss = error of chosen - beta log sigmoid(T (f(chosen) - f(rejected))), with f(error) =
    s error / (exp(s error) - 1) in (0, 1), s = snr_value, T = num_train_timesteps. Beta weighs the
    second term against a mean squared error: 0.1 in the code, not Diffusion-DPO's thousands.
    """

    def likelihood(error):
        return snr_value * error / jnp.expm1(snr_value * error)

    chosen, rejected = likelihood(policy_chosen), likelihood(policy_rejected)
    margin = num_train_timesteps * (chosen - rejected)
    metrics = {
        "likelihood/chosen": chosen,
        "likelihood/rejected": rejected,
        "likelihood/margin": margin,
        "likelihood/accuracy": accuracy(margin),
    }
    return policy_chosen - beta * jax.nn.log_sigmoid(margin), metrics


LOSS = Loss(loss, uses_reference=False)
