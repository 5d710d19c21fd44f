"""AutoencoderKL equals diffusers: moments, images, gradient, weights both ways, old spellings."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from flax import nnx
from safetensors.numpy import load_file, save_file

from agfsync_jax.models.vae import AutoencoderKL, AutoencoderKLConfig
from agfsync_jax.weights.networks import load_model, read_json, save_model
from tests.twins import assert_same_gradients, relative_error, spread

SIZES = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 32,
}
VARIANTS = {"sd": {}, "no quant conv": {"use_quant_conv": False, "use_post_quant_conv": False}}


@pytest.mark.parametrize("variant", ["sd", pytest.param("no quant conv", marks=pytest.mark.slow)])
def test_forward_gradient_and_weights(tmp_path, variant):
    twin = spread(TorchVAE(**SIZES | VARIANTS[variant]))
    twin.save_pretrained(tmp_path / "torch")
    graph, params = load_model(AutoencoderKL, tmp_path / "torch")
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    posterior = twin.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
    decoded = twin.decode(posterior.mean).sample.permute(0, 2, 3, 1)

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        mean, log_variance = model.encode(images)
        return mean, log_variance, model.decode(mean)

    mean, log_variance, ours = run(params)
    assert mean.shape == (2, 8, 8, 4)
    assert relative_error(mean, posterior.mean.permute(0, 2, 3, 1)) <= 1e-5
    assert relative_error(log_variance, posterior.logvar.permute(0, 2, 3, 1)) <= 1e-5
    assert relative_error(ours, decoded) <= 1e-5

    weights = np.random.default_rng(1).standard_normal(ours.shape, np.float32)
    (decoded * torch.from_numpy(weights)).sum().backward()
    assert_same_gradients(jax.jit(jax.grad(lambda p: (run(p)[2] * weights).sum()))(params), twin)

    config = read_json(tmp_path / "torch" / "config.json")
    save_model(AutoencoderKL, tmp_path / "ours", params, config)
    back = TorchVAE.from_pretrained(tmp_path / "ours").state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(back[name], value), name


def test_the_first_checkpoints_spelling_of_attention_loads(tmp_path):
    TorchVAE(**SIZES).save_pretrained(tmp_path)
    _, expected = load_model(AutoencoderKL, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in renamed.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    save_file(tensors, file)
    _, loaded = load_model(AutoencoderKL, tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, loaded))


def test_the_config_must_be_supported():
    with pytest.raises(ValueError, match="latents_mean"):
        AutoencoderKLConfig.from_dict({"latents_mean": [0.0]})
    with pytest.raises(ValueError, match="AttnDownEncoderBlock2D"):
        AutoencoderKLConfig.from_dict({"down_block_types": ["AttnDownEncoderBlock2D"]})
    with pytest.raises(ValueError, match="up_block_types.*each of the 3 block_out_channels"):
        AutoencoderKLConfig.from_dict(SIZES | {"up_block_types": ["UpDecoderBlock2D"] * 2})
    with pytest.raises(ValueError, match="shift_factor=0.1"):
        AutoencoderKLConfig.from_dict(SIZES | {"shift_factor": 0.1})
    xl = {"scaling_factor": 0.13025, "force_upcast": True, "shift_factor": None}
    assert AutoencoderKLConfig.from_dict(SIZES | xl).scaling_factor == 0.13025
