import jax.numpy as jnp
import numpy as np

from agfsync_jax.losses import mapo


def test_metrics_are_likelihoods():
    _, metrics = mapo.loss(jnp.array([0.1, 2.0]), jnp.array([0.3, 0.5]))
    chosen, rejected = metrics["likelihood/chosen"], metrics["likelihood/rejected"]
    np.testing.assert_allclose(chosen, [0.05 / np.expm1(0.05), 1 / np.expm1(1)], rtol=1e-6)
    np.testing.assert_allclose(rejected, [0.15 / np.expm1(0.15), 0.25 / np.expm1(0.25)], rtol=1e-6)
    np.testing.assert_allclose(metrics["likelihood/margin"], 1000 * (chosen - rejected), rtol=1e-6)
    np.testing.assert_array_equal(metrics["likelihood/accuracy"], [1.0, 0.0])
    _, metrics = mapo.loss(jnp.array([0.1]), jnp.array([0.1]))
    np.testing.assert_array_equal(metrics["likelihood/accuracy"], [0.5])
