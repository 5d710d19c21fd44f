"""What training holds at full size, counted and (slow) measured: LoRA has no second copy."""

import multiprocessing

import jax
import numpy as np
import pytest

from agfsync_jax.benches._processes import HostMemory
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans._holdings import training_bytes
from agfsync_jax.plans.sample import abstract_backbone
from agfsync_jax.training import program
from agfsync_jax.training.step import frozen_base, init_state
from configs import sd15, sdxl


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held(config, backbone):
    """Bytes of the base and of (state, frozen base)."""
    spec = program.step_spec(config, backbone=backbone)
    base = backbone.params["unet"]
    state = jax.eval_shape(lambda base: init_state(base, spec), base)
    frozen = jax.eval_shape(lambda base: frozen_base(base, spec), base) if spec.needs_base else ()
    return num_bytes(base), num_bytes(state), num_bytes(frozen), num_bytes(state.params)


def abstract(config):
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    source = config.backbone.path, config.backbone.kind
    return abstract_backbone(config, mesh, *source, param_dtype="float32")


def test_lora_holds_the_base_once_and_its_adapters():
    config = sdxl.get_config("lora")
    backbone = abstract(config)
    base, state, frozen, adapters = held(config, backbone)
    assert round(base / 1e9, 1) == 10.3 and 0.5 * base < frozen < 0.51 * base  # in bfloat16
    assert 3 * adapters <= state < 3.01 * adapters  # and two moments each
    assert state + frozen < 0.55 * base
    config = sdxl.get_config()
    base, state, frozen, params = held(config, backbone)
    assert params == base and 3 * base <= state < 3.001 * base
    assert 0.5 * base < frozen < 0.51 * base  # the reference, in bfloat16


def test_a_reference_that_moves_is_a_copy_of_what_is_trained():
    """In place of the frozen one; adapters still need what they adapt."""
    for variant, copies, frozen_share in (("", 4, 0.0), ("lora", 4, 0.5)):
        config = sd15.get_config(variant)
        config.train.reference_decay = 0.99
        backbone = abstract(config)
        base, state, frozen, params = held(config, backbone)
        assert copies * params <= state < copies * 1.01 * params
        assert frozen_share * base <= frozen <= 1.02 * frozen_share * base
        on_device, checkpoint = training_bytes(config, jax.devices()[:1])
        assert checkpoint == state
        gradients = params * (2 if config.train.device_batch_size else 1)
        assert on_device == pytest.approx(state + gradients + frozen, rel=1e-6)


def measure(config):
    """Bytes that training's state takes in this process, and those that were counted."""
    backbone = abstract(config)
    spec = program.step_spec(config, backbone=backbone)
    base, state, frozen, _ = held(config, backbone)
    counted = state + frozen + base
    rng = np.random.default_rng(0)
    memory = HostMemory()
    base = jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32)), backbone.params["unet"]
    )
    jax.block_until_ready((frozen_base(base, spec), init_state(base, spec)))
    return memory.peak(), counted


@pytest.mark.slow
@pytest.mark.parametrize("config", [sdxl.get_config("lora"), sd15.get_config()])
def test_memory_is_what_was_counted(config):
    """Of random weights. All of SDXL would take 46 GB, so that is Stable Diffusion 1.5."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # with nothing left of another
        measured, counted = pool.apply(measure, (config,))
    print(f"{config.backbone.kind}: {measured / 1e9:.2f} GB measured, {counted / 1e9:.2f} counted")
    assert 0.95 * counted < measured < 1.1 * counted
