import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.losses import agfsync_norm


def mean_loss(policy_chosen, *rest):
    return jnp.mean(agfsync_norm.loss(policy_chosen, *rest, num_elements=64)[0])


def test_no_error_at_all_gives_ln_2_and_a_zero_gradient():
    value, gradient = jax.value_and_grad(mean_loss)(*[jnp.zeros(3)] * 4)
    assert float(value) == pytest.approx(np.log(2))
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_it_acts_like_diffusion_dpo_with_the_beta_of_the_docstring():
    """In float64 and near the reference, beta is sqrt(b num_elements / m)."""
    with jax.enable_x64(True):
        errors = jnp.full(2, 0.1)
        num_elements = 4 * 128 * 128  # of 1024 x 1024 pixels

        def loss(policy_chosen):
            arguments = policy_chosen, errors, errors, errors
            return jnp.mean(agfsync_norm.loss(*arguments, num_elements=num_elements)[0])

        slope = jnp.sum(jax.grad(loss)(errors))
        # Diffusion-DPO's slope is beta / 4 where policy and reference are equal.
        assert float(4 * slope) == pytest.approx((2 * num_elements / 0.1) ** 0.5)
        assert float(4 * slope) == pytest.approx(1145, abs=0.5)
