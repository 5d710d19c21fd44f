"""CLIP's towers equal transformers: forward, gradient, weights both ways."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from transformers import CLIPModel as TorchCLIP
from transformers import CLIPTextModel as TorchText
from transformers import CLIPVisionModel as TorchVision

from agfsync_jax.models.clip import CLIPModel, CLIPTextModel, CLIPVisionModel
from agfsync_jax.utils.weights import load_model, read_json, save_model
from tests.twins import assert_same_gradients, relative_error, spread

SHARED = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SHARED | {
    "hidden_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 9,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}
VISION = SHARED | {"hidden_size": 24, "image_size": 16, "patch_size": 4}
ACTIVATIONS = ("quick_gelu", "gelu")


def make_ids():
    ids = np.random.default_rng(0).integers(0, 48, (3, 9)).astype(np.int32)
    ids[0, 4:], ids[1, 8:], ids[2, 2:] = 49, 49, 49
    return ids


def make_pixels():
    return np.random.default_rng(1).standard_normal((3, 16, 16, 3), np.float32)


def torch_pixels():
    return torch.from_numpy(make_pixels()).permute(0, 3, 1, 2)


def assert_loads_back(cls, twin, params, folder):
    save_model(cls, folder / "ours", params, read_json(folder / "config.json"))
    back = type(twin).from_pretrained(folder / "ours").state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eos_token_id", [49, 2])
def test_text_model(tmp_path, activation, eos_token_id):
    config = TEXT | {"hidden_act": activation, "eos_token_id": eos_token_id}
    twin = spread(TorchText(CLIPTextConfig(**config)))
    twin.save_pretrained(tmp_path)
    graph, params = load_model(CLIPTextModel, tmp_path)
    out = twin(torch.from_numpy(make_ids()).long())
    hidden, pooled = jax.jit(lambda p: nnx.merge(graph, p)(make_ids()))(params)
    assert relative_error(hidden, out.last_hidden_state) <= 1e-5
    assert relative_error(pooled, out.pooler_output) <= 1e-5
    weights = np.random.default_rng(2).standard_normal(hidden.shape, np.float32)
    (out.last_hidden_state * torch.from_numpy(weights)).sum().backward()
    loss = jax.grad(lambda p: (nnx.merge(graph, p)(make_ids())[0] * weights).sum())
    assert_same_gradients(jax.jit(loss)(params), twin, prefix="text_model.")
    assert_loads_back(CLIPTextModel, twin, params, tmp_path)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vision_model(tmp_path, activation):
    twin = spread(TorchVision(CLIPVisionConfig(**VISION, hidden_act=activation)))
    twin.save_pretrained(tmp_path)
    graph, params = load_model(CLIPVisionModel, tmp_path)
    out = twin(torch_pixels())
    hidden, pooled = jax.jit(lambda p: nnx.merge(graph, p)(make_pixels()))(params)
    assert relative_error(hidden, out.last_hidden_state) <= 1e-5
    assert relative_error(pooled, out.pooler_output) <= 1e-5
    assert_loads_back(CLIPVisionModel, twin, params, tmp_path)


def test_both_towers_meet(tmp_path):
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=20)
    twin = spread(TorchCLIP(config))
    twin.save_pretrained(tmp_path)
    graph, params = load_model(CLIPModel, tmp_path)
    out = twin(input_ids=torch.from_numpy(make_ids()).long(), pixel_values=torch_pixels())

    @jax.jit
    def logits(params):
        model = nnx.merge(graph, params)
        image, text = model.get_image_features(make_pixels()), model.get_text_features(make_ids())
        image = image / jax.numpy.linalg.norm(image, axis=-1, keepdims=True)
        text = text / jax.numpy.linalg.norm(text, axis=-1, keepdims=True)
        return jax.numpy.exp(model.logit_scale[...]) * image @ text.T

    assert relative_error(logits(params), out.logits_per_image) <= 1e-5
    assert_loads_back(CLIPModel, twin, params, tmp_path)
