import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agfsync_jax.models import layers, lora
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans.sample import abstract_backbone
from configs import sd15


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


class Layers(nnx.Module):
    """Every kind of layer that has a kernel, and whose names are among the targets below."""

    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.conv = layers.Conv(3, 8, stride=2, dtype=dtype, rngs=rngs)
        self.point = layers.Conv(8, 16, 1, dtype=dtype, rngs=rngs)
        self.linear = layers.Linear(16, 8, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.tanh(self.point(jnp.tanh(self.conv(x)))))


KERNELS = r"(conv|point|linear)\.kernel$"


def layers_and_adapters(size):
    graph, params = nnx.split(Layers())
    adapters = lora.init_adapters(jax.random.key(0), params, rank=4, targets=KERNELS)
    rng = np.random.default_rng(0)
    for pair in adapters.values():
        pair["B"] = jnp.asarray(size * rng.normal(size=pair["B"].shape), jnp.float32)
    return graph, params, adapters, jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)


def test_a_branch_is_the_merged_kernel_and_has_its_gradient():
    graph, params, adapters, x = layers_and_adapters(0.5)

    def total(adapters, join):
        out = nnx.merge(graph, join(params, adapters))(x)
        return jnp.sum(jnp.sin(out)), out

    found = {}
    for join in (lora.attach, lora.merge):
        found[join] = jax.jit(jax.grad(functools.partial(total, join=join), has_aux=True))(adapters)
    (ours, out), (wanted, merged) = found[lora.attach], found[lora.merge]
    np.testing.assert_allclose(out, merged, rtol=1e-5, atol=1e-5)
    assert np.abs(out - nnx.merge(graph, params)(x)).max() > 0.1
    for name, pair in wanted.items():
        for factor, gradient in pair.items():
            scale = np.abs(gradient).max()
            np.testing.assert_allclose(ours[name][factor], gradient, rtol=0, atol=1e-5 * scale)


def test_what_adapters_drop(net):
    """The rest counts more; each adapter has its own, and another key others."""
    graph, params = net
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2, targets=KERNELS)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4000, 8)), jnp.float32)
    kernel = lora.attach(params, adapters, jax.random.key(1), 0.25)
    found = [leaf for leaf in jax.tree.leaves(kernel, is_leaf=is_branched) if is_branched(leaf)]
    assert len(found) == len(adapters) > 1
    masks = [np.asarray(each.drop(x) != 0) for each in found]
    for mask, each in zip(masks, found, strict=True):
        assert abs(mask.mean() - 0.75) < 0.01
        np.testing.assert_allclose(each.drop(x), np.where(mask, x / 0.75, 0), rtol=1e-6)
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    other = lora.attach(params, adapters, jax.random.key(2), 0.25)
    first = next(leaf for leaf in jax.tree.leaves(other, is_leaf=is_branched) if is_branched(leaf))
    assert (np.asarray(first.drop(x) != 0) != masks[0]).mean() > 0.3


def is_branched(leaf):
    return isinstance(leaf, lora.Branched)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_drops_before_its_adapter_alone(dtype):
    graph, params = nnx.split(One(dtype))
    adapters = lora.init_adapters(jax.random.key(0), params, rank=4, targets=KERNELS)
    adapters["linear"]["B"] = adapters["linear"]["B"] + 0.1
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    joined = lora.attach(params, adapters, jax.random.key(1), 0.5)
    branch = joined["linear"]["kernel"][...]
    got = jax.jit(lambda joined, x: nnx.merge(graph, joined)(x))(joined, x)
    pair = adapters["linear"]
    wanted = x @ params["linear"]["kernel"][...] + branch.drop(x) @ pair["A"] @ pair["B"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 if dtype == jnp.float32 else 0.03)


class One(nnx.Module):
    def __init__(self, dtype):
        self.linear = layers.Linear(64, 64, dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


def test_in_bfloat16_a_branch_is_nearer_than_a_merged_kernel():
    """An adapter that is a hundredth of its kernel: what it adds, beside the float32 layer."""
    graph, params = nnx.split(One(jnp.float32))
    adapters = lora.init_adapters(jax.random.key(0), params, rank=4, targets=KERNELS)
    rng = np.random.default_rng(0)
    adapters["linear"]["B"] = jnp.asarray(2e-3 * rng.normal(size=(4, 64)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    exact = nnx.merge(graph, lora.merge(params, adapters))(x) - nnx.merge(graph, params)(x)
    narrow = nnx.split(One(jnp.bfloat16))[0]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    base = nnx.merge(narrow, half)(x).astype(jnp.float32)
    errors = {}
    for join in (lora.attach, lora.merge):
        got = nnx.merge(narrow, join(half, adapters))(x).astype(jnp.float32) - base
        errors[join] = float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))
    # Most of what is left is the rounding of the output itself.
    assert errors[lora.attach] < 0.9 * errors[lora.merge] < 0.5


def test_a_branch_raises_as_merge(net):
    adapters = lora.init_adapters(jax.random.key(0), net[1], rank=2)
    with pytest.raises(ValueError, match="adapters of unknown kernels: other"):
        lora.attach(net[1], adapters | {"other": adapters["attn1.to_q"]})


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 128),  # 16 blocks of 2 attentions of 4 projections
        ("transformers", 192),  # as in kohya's files
        ("all", 278),  # 22 resnets, 14 of them with a shortcut, and 6 samplers
    ],
)
def test_targets_in_stable_diffusion(targets, count):
    source = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5"
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    params = abstract_backbone(sd15.get_config(), mesh, *source).params["unet"]
    adapters = jax.eval_shape(
        lambda params: lora.init_adapters(
            jax.random.key(0), params, rank=8, targets=lora.TARGETS[targets]
        ),
        params,
    )
    assert len(adapters) == count
