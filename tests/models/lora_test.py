import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agfsync_jax.models import lora


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
        self.point_conv = nnx.Conv(4, 5, (1, 1), rngs=rngs)
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
    merged = lora.merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_merge_adds_the_scaled_product_to_its_kernel_only(net):
    graph, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    adapters["attn1.to_q"]["B"] = jnp.ones((2, 8))
    merged = lora.merge(params, adapters, scale=3.0)
    before, after = nnx.merge(graph, params), nnx.merge(graph, merged)
    expected = before.attn1.to_q.kernel[...] + 3.0 * (
        adapters["attn1.to_q"]["A"] @ adapters["attn1.to_q"]["B"]
    )
    np.testing.assert_allclose(after.attn1.to_q.kernel[...], expected, rtol=1e-6)
    np.testing.assert_array_equal(after.attn1.to_k.kernel[...], before.attn1.to_k.kernel[...])
    np.testing.assert_array_equal(after.conv.kernel[...], before.conv.kernel[...])


def test_gradients_reach_the_adapters_as_in_a_side_branch(net):
    """x W + s (x A) B, written as the paper writes it, has the same value and gradients."""
    graph, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    x = jax.random.normal(jax.random.key(1), (3, 6))

    def merged(adapters):
        attention = nnx.merge(graph, lora.merge(params, adapters, scale=2.0)).attn1
        return jnp.sum(attention(x) ** 2)

    def branched(adapters):
        attention = nnx.merge(graph, params).attn1
        q, out = adapters["attn1.to_q"], adapters["attn1.to_out.0"]
        hidden = jax.nn.tanh(attention.to_q(x) + 2.0 * (x @ q["A"]) @ q["B"])
        return jnp.sum((attention.to_out[0](hidden) + 2.0 * (hidden @ out["A"]) @ out["B"]) ** 2)

    got, want = (jax.value_and_grad(f)(adapters) for f in (merged, branched))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_the_product_of_a_convolution_is_two_convolutions(net):
    """conv(x, W) + s conv(conv(x, A), B) with a 1x1 B, and so for a 1x1 kernel."""
    graph, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=3, targets=r"conv\.kernel$")
    assert {name: jax.tree.map(jnp.shape, each) for name, each in adapters.items()} == {
        "conv": {"A": (3, 3, 3, 3), "B": (3, 4)},
        "point_conv": {"A": (1, 1, 4, 3), "B": (3, 5)},
    }
    keys = iter(jax.random.split(jax.random.key(1), 4))
    adapters = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), adapters)
    x = jax.random.normal(jax.random.key(2), (2, 7, 6, 3))
    merged = nnx.merge(graph, lora.merge(params, adapters, scale=0.5))
    got = merged.point_conv(jax.nn.tanh(merged.conv(x)))

    def branched(layer, x, a, b):
        dimensions = ("NHWC", "HWIO", "NHWC")
        down = jax.lax.conv_general_dilated(x, a, (1, 1), "SAME", dimension_numbers=dimensions)
        return layer(x) + 0.5 * down @ b

    own = nnx.merge(graph, params)
    hidden = jax.nn.tanh(branched(own.conv, x, *adapters["conv"].values()))
    want = branched(own.point_conv, hidden, *adapters["point_conv"].values())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_kept_apart_they_give_what_fused_ones_give(net):
    """Merged in the compiled call, at a scale that may change, the parameters stay as they are."""
    graph, params = net
    before = jax.tree.map(np.array, params)
    adapters = lora.init_adapters(
        jax.random.key(0), params, rank=2, targets=r"(to_q|to_out\.0|conv)\.kernel$"
    )
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    x, image = jax.random.normal(jax.random.key(1), (3, 6)), jnp.ones((1, 4, 4, 3))

    @jax.jit
    def apply(params):
        model = nnx.merge(graph, params)
        return model.attn1(x), model.conv(image)

    apart = jax.jit(
        lambda params, adapters, scale: apply(lora.merge(params, adapters, scale=scale))
    )
    for scale in (1.0, 0.25):
        got = apart(params, adapters, scale)
        want = apply(lora.merge(params, adapters, scale=scale))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert not np.allclose(got[0], apply(params)[0])
    assert apart._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_several_are_merged_one_after_the_other(net):
    _, params = net
    one, two = (
        jax.tree.map(
            lambda leaf: leaf + 0.1, lora.init_adapters(jax.random.key(seed), params, rank=rank)
        )
        for seed, rank in ((0, 2), (1, 3))
    )
    merged = lora.merge(lora.merge(params, one, scale=0.7), two, scale=-0.3)
    want = params.attn1.to_q.kernel[...]
    for scale, each in ((0.7, one), (-0.3, two)):
        want = want + scale * each["attn1.to_q"]["A"] @ each["attn1.to_q"]["B"]
    np.testing.assert_allclose(merged.attn1.to_q.kernel[...], want, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_kernel_keeps_its_dtype_and_is_summed_in_float32(net):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), net[1])
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
    assert adapters["attn1.to_q"]["A"].dtype == jnp.float32
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    merged = lora.merge(params, adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
        merged,
        lora.merge(exact, adapters),
    )


def test_errors(net):
    _, params = net
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        lora.init_adapters(key, params, rank=0)
    with pytest.raises(ValueError, match=r"rank 7.*at least 7.*attn1.to_k.kernel \(5, 8\)"):
        lora.init_adapters(key, params, rank=7)
    with pytest.raises(ValueError, match=r"not conv.bias \(4,\)"):
        lora.init_adapters(key, params, rank=2, targets=r"^conv\.")
    with pytest.raises(ValueError, match="no parameter matches.*'nothing'"):
        lora.init_adapters(key, params, rank=2, targets="nothing")
    wrong = {
        "other": {"A": jnp.ones((2, 1)), "B": jnp.ones((1, 2))},
        "conv": {"A": jnp.ones((1, 1, 3, 2)), "B": jnp.ones((2, 4))},
    }
    with pytest.raises(ValueError, match=r"unknown kernels: other; .* conv A \(1, 1, 3, 2\) B"):
        lora.merge(params, wrong)
