"""What training holds at SDXL's size, counted without memory: LoRA has no second copy."""

import jax

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans.sample import abstract_backbone
from agfsync_jax.training import program
from agfsync_jax.training.step import frozen_base, init_state
from configs import sdxl


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held(config, backbone):
    """Bytes of the base and of (state, frozen base)."""
    settings = program.settings_of(config, backbone, 0)
    base = backbone.params["unet"]
    state = jax.eval_shape(lambda base: init_state(base, settings), base)
    frozen = jax.eval_shape(lambda base: frozen_base(base, settings), base)
    return num_bytes(base), num_bytes(state), num_bytes(frozen), num_bytes(state.params)


def test_lora_holds_the_base_once_and_its_adapters():
    config = sdxl.get_config("lora")
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    source = config.backbone.path, config.backbone.kind
    backbone = abstract_backbone(config, mesh, *source, param_dtype="float32")
    base, state, frozen, adapters = held(config, backbone)
    assert round(base / 1e9, 1) == 10.3 and frozen == base
    assert 3 * adapters <= state < 3.01 * adapters  # and two moments each
    assert state + frozen < 1.05 * base
    config = sdxl.get_config()
    base, state, frozen, params = held(config, backbone)
    assert params == base and 3 * base <= state < 3.001 * base
    assert 0.5 * base < frozen < 0.51 * base  # the reference, in bfloat16
