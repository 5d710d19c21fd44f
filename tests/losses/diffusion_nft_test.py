"""What the formula of DiffusionNFT does not say: where it begins, and metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.losses import Residuals, dgpo, diffusion_nft

RNG = np.random.default_rng(0)
REFERENCE = jnp.asarray(RNG.normal(size=(6, 2, 8)), jnp.float32)
POLICY = REFERENCE + jnp.asarray(0.1 * RNG.normal(size=(6, 2, 8)), jnp.float32)
FIRST_IS_BETTER = jnp.tile(jnp.array([7.0, 3.0]), (6, 1))
ALL = jnp.ones((6, 2), bool)
SCALE = jnp.array([0.1, 0.5, 0.9, 1.0, 3.0, jnp.inf])


def nft(policy, reference=REFERENCE, scale=SCALE, scores=FIRST_IS_BETTER, **settings):
    return diffusion_nft.loss(policy, reference, scale, scores, ALL, **settings)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_where_policy_and_reference_are_equal_it_is_dgpo(beta):
    """But for how much an image counts: twice its scale, by the mean size of its residual."""

    def listed(policy):
        residuals = Residuals(policy, REFERENCE, FIRST_IS_BETTER, ALL)
        return jnp.sum(dgpo.LOSS(residuals)[0])

    size = jnp.minimum(SCALE, 1)[:, None] / jnp.mean(jnp.abs(REFERENCE), axis=2)
    got = jax.grad(lambda policy: jnp.sum(nft(policy, beta=beta)[0]))(REFERENCE)
    wanted = jax.grad(listed)(REFERENCE) * 2 * size[..., None]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)


def test_metrics():
    _, metrics = nft(POLICY)
    errors = (jnp.minimum(SCALE, 1)[:, None] ** 2) * jnp.mean(REFERENCE**2 - POLICY**2, axis=2)
    np.testing.assert_allclose(metrics["rewards/chosen"], errors[:, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], errors[:, 1], rtol=1e-4, atol=1e-6)
    assert metrics["rewards/equal_groups"] == 0
    _, metrics = nft(POLICY, scores=0 * FIRST_IS_BETTER)
    assert metrics["rewards/equal_groups"] == 1


def test_no_residual_at_all_has_no_gradient():
    gradient = jax.grad(lambda policy: jnp.sum(nft(policy, reference=0 * REFERENCE)[0]))
    np.testing.assert_array_equal(gradient(0 * POLICY), 0)


def test_a_bound_that_is_none():
    with pytest.raises(ValueError, match="max_advantage is 0.0, expected more than 0"):
        diffusion_nft.LOSS.configured(max_advantage=0.0)
