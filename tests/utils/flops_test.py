"""Counted operations against formulas, and against what is known of the released models."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import flops
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model, read_json


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        *(x, kernel, (2, 2), ((1, 1), (1, 1))),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


CONV = 2 * (2 * 8 * 8 * 12) * (3 * 3 * 6)  # outputs, products of each


@pytest.mark.parametrize("groups", [1, 3])
def test_convolutions(groups):
    args = floats(2, 16, 16, 6), floats(3, 3, 6 // groups, 12)
    assert flops.count(lambda x, k: conv(x, k, groups), *args) == CONV // groups


def test_a_convolutions_gradient_costs_twice_as_much():
    def loss(x, kernel):
        return jnp.square(conv(x, kernel)).sum()

    args = floats(2, 16, 16, 6), floats(3, 3, 6, 12)
    assert flops.count(jax.grad(loss, argnums=(0, 1)), *args) == 3 * CONV


def test_products_in_loops_branches_and_calls():
    def product(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    args, once = (floats(5, 4, 4), floats(5, 4, 4)), 2 * 5 * 4 * 4 * 4
    assert flops.count(product, *args) == once
    assert flops.count(jax.jit(product), *args) == once
    assert flops.count(jax.checkpoint(product), *args) == once

    def scanned(x, y):
        return jax.lax.scan(lambda x, _: (product(x, y), None), x, length=7)[0]

    assert flops.count(scanned, *args) == 7 * once

    def either(x, y):
        return jax.lax.cond(x[0, 0, 0] > 0, product, lambda x, y: product(product(x, y), y), x, y)

    assert flops.count(either, *args) == 2 * once

    def endless(x, y):
        return jax.lax.while_loop(lambda x: x[0, 0, 0] > 0, lambda x: product(x, y), x)

    with pytest.raises(ValueError, match="a while loop has products"):
        flops.count(endless, *args)


def test_a_split_program_counts_whole():
    mesh = create_mesh({"data": 4, "fsdp": 2}, devices=jax.devices()[:8])
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    for names in (("data",), ("data", "fsdp")):  # where fsdp is manual too, its devices do the same
        split = jax.shard_map(
            jnp.dot, mesh=mesh, in_specs=(rows, whole), out_specs=rows, axis_names=set(names)
        )
        repeated = 2 if "fsdp" in names else 1
        assert flops.count(split, floats(8, 3), floats(3, 5)) == repeated * 2 * 8 * 3 * 5


@pytest.mark.parametrize(
    "kind, latent, unet, decode, encode",
    [
        ("stable-diffusion-v1-5", 64, 0.803, 2.51, 1.12),
        ("stable-diffusion-xl-base", 128, 6.76, 10.5, 4.88),
    ],
)
def test_released_models(tmp_path, kind, latent, unet, decode, encode):
    """TFLOP of a row; the UNet of SDXL does 5.98 without the products of attention."""
    skeletons.write_skeleton(kind, tmp_path)

    def model(cls, name):
        config = cls.config_class.from_dict(read_json(tmp_path / name / "config.json"))
        return config, *abstract_model(cls, config)

    config, graph, params = model(UNet2DConditionModel, "unet")
    noisy = floats(1, latent, latent, 4)
    args = [noisy, floats(1), floats(1, 77, config.cross_attention_dim)]
    if config.addition_embed_type:
        args += [floats(1, 1280), floats(1, 6)]
    counted = flops.count(lambda params, *args: nnx.merge(graph, params)(*args), params, *args)
    assert counted / 1e12 == pytest.approx(unet, rel=2e-3)

    _, graph, params = model(AutoencoderKL, "vae")
    image = floats(1, 8 * latent, 8 * latent, 3)
    counted = flops.count(lambda params, x: nnx.merge(graph, params).decode(x), params, noisy)
    assert counted / 1e12 == pytest.approx(decode, rel=5e-3)
    counted = flops.count(lambda params, x: nnx.merge(graph, params).encode(x), params, image)
    assert counted / 1e12 == pytest.approx(encode, rel=5e-3)


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks(kind, tera):
    assert flops.peak(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "AMD EPYC, 2 threads", "NVIDIA L400", "Tesla T4"])
def test_unknown_peaks(kind):
    assert flops.peak(kind) is None
