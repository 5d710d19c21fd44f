"""Queries, keys and values, and what any kernel of attention has to make of them."""

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.models.attention import plain
from tests.twins import relative_error

TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (8e-3, 2e-2)}  # forward, gradient


def inputs(b, s, t, h, d, dtype="float32"):
    random = np.random.default_rng(0)
    shapes = ((b, s, h, d), (b, t, h, d), (b, t, h, d))
    return [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]


def both(function):
    """jit of the result and its gradients, under a loss that weighs each number differently."""

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out = function(q, k, v)
            weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return (out.astype(jnp.float32) * weights).sum(), out

        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    return run


def assert_equals_plain(function, arrays):
    """In the dtype's tolerance of the plain formula in float32."""
    out, gradients = both(function)(*arrays)
    scale = arrays[0].shape[-1] ** -0.5
    expected = both(lambda q, k, v: plain(q, k, v, scale=scale))
    wanted, wanted_gradients = expected(*(x.astype(jnp.float32) for x in arrays))
    forward, backward = TOLERANCE[arrays[0].dtype.name]
    assert out.dtype == arrays[0].dtype and out.shape == arrays[0].shape
    assert relative_error(out, wanted) <= forward
    for ours, gradient in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(ours, gradient) <= backward
