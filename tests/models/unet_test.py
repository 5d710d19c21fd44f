"""UNet2DConditionModel equals diffusers: forward, gradient, weights both ways."""

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from agfsync_jax.models.unet import UNet2DConditionConfig, UNet2DConditionModel
from agfsync_jax.utils.weights import load_model, read_json, save_model
from tests.twins import assert_same_gradients, relative_error, spread

SIZES = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
VARIANTS = {
    "sd1": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": (2, 4, 4), "use_linear_projection": True},
    "one layer": {"attention_head_dim": 2, "layers_per_block": 1, "freq_shift": 1},
}


def make_batch():
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 8, 8, 4), np.float32)
    return sample, np.array([3, 901], np.int32), rng.standard_normal((2, 5, 12), np.float32)


def run_torch(twin, sample, timesteps, context):
    sample = torch.from_numpy(sample).permute(0, 3, 1, 2)
    out = twin(sample, torch.from_numpy(timesteps), torch.from_numpy(context)).sample
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_gradient_and_weights(tmp_path, variant):
    twin = spread(TorchUNet(**SIZES | VARIANTS[variant]))
    twin.save_pretrained(tmp_path / "torch")
    graph, params = load_model(UNet2DConditionModel, tmp_path / "torch")
    batch = make_batch()
    expected = run_torch(twin, *batch)
    actual = jax.jit(lambda p: nnx.merge(graph, p)(*batch))(params)
    assert relative_error(actual, expected) <= 1e-5

    weights = np.random.default_rng(1).standard_normal(actual.shape, np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(*batch) * weights).sum()))(params)
    assert_same_gradients(grads, twin)

    config = read_json(tmp_path / "torch" / "config.json")
    save_model(UNet2DConditionModel, tmp_path / "ours", params, config)
    back = TorchUNet.from_pretrained(tmp_path / "ours")
    for name, value in twin.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_the_config_must_be_supported(tmp_path):
    TorchUNet(**SIZES, attention_head_dim=4, class_embed_type="timestep").save_config(tmp_path)
    with pytest.raises(ValueError, match="class_embed_type='timestep'"):
        UNet2DConditionConfig.from_dict(read_json(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="down_block_types"):
        UNet2DConditionConfig.from_dict({"down_block_types": ["AttnDownBlock2D"] * 4})


def test_bfloat16_points_the_same_way(tmp_path):
    twin = spread(TorchUNet(**SIZES | VARIANTS["sd1"]))
    twin.save_pretrained(tmp_path)
    batch, outs = make_batch(), []
    for dtype in ("float32", "bfloat16"):
        graph, params = load_model(UNet2DConditionModel, tmp_path, dtype=dtype)
        out = jax.jit(lambda p, graph=graph: nnx.merge(graph, p)(*batch))(params)
        outs.append(np.asarray(out, np.float32).ravel())
    cosine = outs[0] @ outs[1] / np.linalg.norm(outs[0]) / np.linalg.norm(outs[1])
    assert cosine >= 0.999
