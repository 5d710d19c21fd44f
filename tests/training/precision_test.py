"""Narrow dtypes: a step of the shipped UNet in bfloat16 and float16 beside one in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.losses import Loss, diffusion_dpo
from agfsync_jax.micro.drawing import degrade
from agfsync_jax.micro.training import renders
from agfsync_jax.training.step import (
    StepSpec,
    _scaled_backward,
    frozen_base,
    init_state,
    train_step,
)
from tests.tiny_backbone import TinyBackbone

PAIRS = 16
KEEP = optax.GradientTransformation(  # the state is the last gradient, and nothing is trained
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params: (jax.tree.map(jnp.zeros_like, grads), grads),
)


@pytest.fixture(scope="module")
def batch():
    """Scenes, chosen, and the same ones damaged, rejected."""
    backbone = StableDiffusion.load("micro:stable-diffusion")
    rng = np.random.default_rng(0)
    scenes, images = renders(PAIRS, "train", 0)
    worse = np.stack([degrade(image, rng) for image in images])
    encode = jax.jit(functools.partial(backbone.encode_image, backbone.params))
    chosen, rejected = (encode(each) for each in (images, worse))
    tokens = backbone.tokenize([scene.caption() for scene in scenes])
    return {
        "latents": jnp.stack([chosen, rejected], axis=1),
        "example": jnp.arange(PAIRS),
        "conditioning": jax.jit(backbone.encode_prompt)(backbone.params, tokens),
    }


def step(batch, dtype):
    """Margins [PAIRS] and the gradient of a policy that is a little away from its reference."""
    backbone = StableDiffusion.load("micro:stable-diffusion", dtype=dtype)
    base, rng = backbone.params["unet"], np.random.default_rng(1)

    def moved(leaf):
        return leaf + 0.002 * jnp.std(leaf) * rng.standard_normal(leaf.shape, np.float32)

    def formula(*errors):
        values, metrics = diffusion_dpo.loss(*errors, beta=2000.0)
        margin = metrics["rewards/margin"]
        return values, metrics | {f"margin_{i}": margin[i] for i in range(PAIRS)}

    loss = Loss(formula)
    spec = StepSpec(loss, KEEP, lambda step: 0.0, seed=3, backbone=backbone)
    state = init_state(jax.tree.map(moved, base), spec)
    frozen = {"base": frozen_base(base, spec), "text": {}}
    run = jax.jit(functools.partial(train_step, spec=spec))
    state, metrics = run(state, frozen, batch)
    gradient = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state)])
    return np.array([metrics[f"margin_{i}"] for i in range(PAIRS)]), gradient


def cosine(left, right):
    left, right = np.float64(left), np.float64(right)
    return left @ right / (np.linalg.norm(left) * np.linalg.norm(right))


@pytest.mark.slow
def test_half_precision_is_near_to_float32(batch):
    """float16 has eight times bfloat16's precision, and margins early in training need it."""
    true, gradient = step(batch, "float32")
    for dtype, least, most in (("bfloat16", 0.9, 4.0), ("float16", 0.999, 0.2)):
        margins, narrow = step(batch, dtype)
        noise = np.sqrt(np.mean((margins - true) ** 2)) / true.std()
        print(f"{dtype}: noise {noise:.3f} of the margins, cosine {cosine(gradient, narrow):.5f}")
        assert cosine(gradient, narrow) > least and noise < most


def test_gradients_that_float16_does_not_have_reach_the_parameters():
    rng = np.random.default_rng(0)
    weights, x = (jnp.asarray(rng.standard_normal(64, np.float32)) for _ in range(2))

    def network(weights, x, *_):
        return jnp.tanh(weights.astype(jnp.float16) * x.astype(jnp.float16))

    def gradient(network):
        return jax.grad(lambda weights: 1e-10 * jnp.sum(network(weights, x, 0, 0)))(weights)

    wide = gradient(lambda weights, *_: jnp.tanh(weights * x))
    scaled = gradient(_scaled_backward(network))
    assert scaled.dtype == jnp.float32 and cosine(scaled, wide) > 0.9999
    np.testing.assert_allclose(jnp.linalg.norm(scaled), jnp.linalg.norm(wide), rtol=1e-3)
    assert not jnp.any(gradient(lambda *args: network(*args).astype(jnp.float32)))
    none = jax.grad(lambda weights: 0 * jnp.sum(_scaled_backward(network)(weights, x, 0, 0)))
    assert not jnp.any(none(weights))


def test_float16_trains_with_scaled_gradients():
    """The whole step, for a loss whose gradients are far below what float16 has."""
    found = {}
    for dtype in (jnp.float32, jnp.float16):
        backbone = TinyBackbone.load("")
        plain = backbone.denoise
        backbone.denoise = lambda params, latents, *args, plain=plain, dtype=dtype: plain(
            params, latents.astype(dtype), *args
        ).astype(dtype)
        backbone.dtype = dtype
        tokens = jnp.arange(6).reshape(2, 3)
        latents = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))
        conditioning = jax.jit(backbone.encode_prompt)(backbone.params, tokens)
        given = {"latents": latents, "example": jnp.arange(2), "conditioning": conditioning}
        spec = StepSpec(
            diffusion_dpo.LOSS.configured(beta=1e-6), KEEP, lambda step: 0.0, 3, backbone=backbone
        )
        base = backbone.params["unet"]
        state = init_state(jax.tree.map(lambda leaf: 1.1 * leaf, base), spec)
        frozen = {"base": frozen_base(base, spec), "text": {}}
        state, _ = jax.jit(functools.partial(train_step, spec=spec))(state, frozen, given)
        leaves = jax.tree.leaves(state.opt_state)
        found[dtype] = np.concatenate([np.ravel(leaf) for leaf in leaves])
    assert np.linalg.norm(found[jnp.float32]) > 0
    assert cosine(found[jnp.float16], found[jnp.float32]) > 0.999
