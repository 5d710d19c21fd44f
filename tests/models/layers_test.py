"""Normalization where one pass over squares would leave little but roundings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from agfsync_jax.models.layers import GroupNorm

EPSILON = 1e-6


def compare(x, rtol):
    """Ours and its gradient against torch's in float64; the weights are not ones and zeros."""
    rng = np.random.default_rng(1)
    scale, bias, ahead = rng.normal(size=8), rng.normal(size=8), rng.normal(size=x.shape)
    norm = GroupNorm(8, 4, EPSILON, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(norm(x) * ahead))(jnp.float32(x))
    ours = np.asarray(norm(jnp.float32(x)))
    assert np.isfinite(ours).all() and np.isfinite(gradient).all() and np.isfinite(value)

    theirs = torch.nn.GroupNorm(4, 8, eps=EPSILON).double()
    theirs.weight.data, theirs.bias.data = torch.tensor(scale), torch.tensor(bias)
    given = torch.tensor(np.float32(x).astype(np.float64), requires_grad=True)
    want = theirs(given.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    (want * torch.tensor(ahead)).sum().backward()
    np.testing.assert_allclose(ours, want.detach(), rtol=rtol, atol=rtol)
    size = np.abs(given.grad.numpy()).max()
    np.testing.assert_allclose(gradient, given.grad, rtol=rtol, atol=rtol * size)


def test_usual_values():
    compare(np.random.default_rng(0).normal(size=(2, 5, 6, 8)), rtol=2e-5)


@pytest.mark.parametrize("seed", range(5))
def test_channels_of_one_value_each(seed):
    """Their own variance is none, that between them is the group's."""
    values = np.random.default_rng(seed).uniform(0.1, 30, size=(2, 1, 1, 8))
    compare(np.broadcast_to(values, (2, 16, 16, 8)), rtol=2e-4)


def test_a_small_deviation_from_a_large_mean():
    """In float32, the squares of 30 have steps of 6e-5; the variance is 1e-4."""
    rng = np.random.default_rng(0)
    compare(30 + 0.01 * rng.normal(size=(2, 16, 16, 8)), rtol=2e-3)


def test_constants_stay_finite():
    """200 of them: of a variance that is zero nothing below zero may be left."""
    values = np.random.default_rng(0).uniform(0, 100, size=(200, 1, 1, 1))
    norm = GroupNorm(8, 4, EPSILON, rngs=nnx.Rngs(0))
    found = jax.jit(norm)(jnp.float32(np.broadcast_to(values, (200, 8, 8, 8))))
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 0.02  # 100 has a rounding of 4e-6, and epsilon's root is 1e-3
