import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agfsync_jax.diffusion import lora


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.to_q = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
        self.to_k = nnx.Linear(5, 8, use_bias=False, rngs=rngs)
        self.to_v = nnx.Linear(5, 8, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(8, 6, rngs=rngs)])

    def __call__(self, x):
        return self.to_out[0](jax.nn.tanh(self.to_q(x)))


class Net(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.attn1 = Attention(rngs)


@pytest.fixture
def net():
    return nnx.split(Net())


def test_targets_are_the_attention_projections(net):
    adapters = lora.init_adapters(jax.random.key(0), net[1], rank=2)
    assert sorted(adapters) == ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v"]
    assert adapters["attn1.to_k"]["A"].shape == (5, 2)
    assert adapters["attn1.to_k"]["B"].shape == (2, 8)
    assert adapters["attn1.to_out.0"]["A"].shape == (8, 2)


def test_fresh_adapters_change_nothing(net):
    _, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    merged = lora.merge(params, adapters, alpha=2)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merge_adds_the_scaled_product_to_its_kernel_only(net):
    graph, params = net
    rank, alpha = 2, 6.0
    adapters = lora.init_adapters(jax.random.key(0), params, rank=rank)
    adapters["attn1.to_q"]["B"] = jnp.ones((rank, 8))
    merged = lora.merge(params, adapters, alpha=alpha)
    before, after = nnx.merge(graph, params), nnx.merge(graph, merged)
    expected = before.attn1.to_q.kernel[...] + alpha / rank * (
        adapters["attn1.to_q"]["A"] @ adapters["attn1.to_q"]["B"]
    )
    np.testing.assert_allclose(after.attn1.to_q.kernel[...], expected, rtol=1e-6)
    np.testing.assert_array_equal(after.attn1.to_k.kernel[...], before.attn1.to_k.kernel[...])
    np.testing.assert_array_equal(after.conv.kernel[...], before.conv.kernel[...])


def test_gradients_reach_the_adapters_as_in_a_side_branch(net):
    """x W + alpha / r (x A) B, written as the paper writes it, has the same value and gradients."""
    graph, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    x = jax.random.normal(jax.random.key(1), (3, 6))

    def merged(adapters):
        attention = nnx.merge(graph, lora.merge(params, adapters, alpha=4.0)).attn1
        return jnp.sum(attention(x) ** 2)

    def branched(adapters):
        attention = nnx.merge(graph, params).attn1
        q, out = adapters["attn1.to_q"], adapters["attn1.to_out.0"]
        hidden = jax.nn.tanh(attention.to_q(x) + 2.0 * (x @ q["A"]) @ q["B"])
        return jnp.sum((attention.to_out[0](hidden) + 2.0 * (hidden @ out["A"]) @ out["B"]) ** 2)

    got, want = (jax.value_and_grad(f)(adapters) for f in (merged, branched))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_adapters_of_a_bfloat16_kernel_keep_its_dtype(net):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), net[1])
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    assert adapters["attn1.to_q"]["A"].dtype == jnp.float32
    merged = lora.merge(params, adapters, alpha=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_errors(net):
    _, params = net
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lora.init_adapters(key, params, rank=0)
    with pytest.raises(ValueError, match=r"rank 7.*at least 7.*attn1.to_k.kernel \(5, 8\)"):
        lora.init_adapters(key, params, rank=7)
    with pytest.raises(ValueError, match="no parameter matches.*'nothing'"):
        lora.init_adapters(key, params, rank=2, targets="nothing")
    with pytest.raises(ValueError, match="unknown kernels: other"):
        lora.merge(params, {"other": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))}}, alpha=1)
