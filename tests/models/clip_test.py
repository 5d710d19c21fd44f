"""CLIP's towers equal transformers: forward, gradient, weights both ways."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
)
from transformers import CLIPModel as TorchCLIP
from transformers import CLIPTextModel as TorchText
from transformers import CLIPTextModelWithProjection as TorchProjected
from transformers import CLIPVisionModel as TorchVision

from agfsync_jax.models.clip import CLIPConfig as OurConfig
from agfsync_jax.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from agfsync_jax.weights.networks import init_model, load_model, read_json, save_model
from tests.released import VisionTower
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
    out = twin(torch.from_numpy(make_ids()).long(), output_hidden_states=True)
    expected = [out.last_hidden_state, out.pooler_output, out.hidden_states[-2]]
    grads = assert_same_outputs(graph, params, expected)
    assert_same_gradients(grads, twin, prefix="text_model.")
    assert_loads_back(CLIPTextModel, twin, params, tmp_path)


def assert_same_outputs(graph, params, expected):
    """All that a text tower gives equals torch's; returns the gradient of a mixture of it."""
    rng = np.random.default_rng(2)
    weights = [rng.standard_normal(each.shape).astype(np.float32) for each in expected]

    def loss(params):
        found = [each for each in nnx.merge(graph, params)(make_ids()) if each is not None]
        terms = [(each * w).sum() for each, w in zip(found, weights, strict=True)]
        return sum(terms), found

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for actual, value in zip(found, expected, strict=True):
        assert relative_error(actual, value) <= 1e-5
    terms = [(each * torch.from_numpy(w)).sum() for each, w in zip(expected, weights, strict=True)]
    sum(terms).backward()
    return without_key_biases(grads)


def without_key_biases(grads):
    """The gradients but those of key biases, which must be nothing but rounding.

    Such a bias adds the same to all scores of a query, which the softmax cancels: its exact
    gradient is zero, and what float32 leaves of it in either library is about an ulp of the rest.
    """
    flat = nnx.to_flat_state(grads)
    largest = max(np.abs(leaf[...]).max() for _, leaf in flat)
    zero = [leaf[...] for path, leaf in flat if path[-2:] == ("k_proj", "bias")]
    assert len(zero) == 2 and max(np.abs(leaf).max() for leaf in zero) <= 1e-6 * largest
    return nnx.from_flat_state([item for item in flat if item[0][-2:] != ("k_proj", "bias")])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_text_model_with_projection(tmp_path, activation):
    """The second text encoder of XL, with its keys as transformers 4 and 5 spell them."""
    config = CLIPTextConfig(**TEXT, hidden_act=activation, projection_dim=20)
    twin = spread(TorchProjected(config))
    twin.save_pretrained(tmp_path)
    graph, params = load_model(CLIPTextModelWithProjection, tmp_path)
    out = twin(torch.from_numpy(make_ids()).long(), output_hidden_states=True)
    pooled = out.last_hidden_state[np.arange(3), (make_ids() == 49).argmax(-1)]
    expected = [out.last_hidden_state, pooled, out.hidden_states[-2], out.text_embeds]
    grads = assert_same_outputs(graph, params, expected)
    assert_same_gradients(grads, twin)
    assert_loads_back(CLIPTextModelWithProjection, twin, params, tmp_path)


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_keys_with_and_without_their_prefix(tmp_path, cls):
    twin = {CLIPTextModel: TorchText, CLIPTextModelWithProjection: TorchProjected}[cls]
    spread(twin(CLIPTextConfig(**TEXT, projection_dim=20))).save_pretrained(tmp_path)
    _, expected = load_model(cls, tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {re.sub(r"^text_model\.", "", key): value for key, value in load_file(file).items()}
    assert "embeddings.token_embedding.weight" in bare
    prefixed = {
        key if key.startswith("text_projection") else f"text_model.{key}": value
        for key, value in bare.items()
    }
    prefixed["text_model.embeddings.position_ids"] = np.arange(9)[None]
    for tensors in (bare, prefixed):
        save_file(tensors, file)
        _, loaded = load_model(cls, tmp_path)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, loaded))


def test_the_first_layers_input_is_penultimate_to_one_layer():
    config = CLIPTextModel.config_class.from_dict(TEXT | {"num_hidden_layers": 1})
    graph, params = init_model(CLIPTextModel, config)
    model = nnx.merge(graph, params)
    out = model(make_ids())
    np.testing.assert_array_equal(
        out.penultimate_hidden_state, model.text_model.embeddings(make_ids())
    )
    assert out.text_embeds is None


def test_bfloat16_points_the_same_way():
    config = CLIPTextModelWithProjection.config_class.from_dict(TEXT | {"projection_dim": 20})
    outs = []
    for dtype in ("float32", "bfloat16"):
        graph, params = init_model(CLIPTextModelWithProjection, config, dtype=dtype)
        outs.append(jax.jit(lambda p, graph=graph: nnx.merge(graph, p)(make_ids()))(params))
    for exact, half in zip(*outs, strict=True):
        assert half.dtype == jax.numpy.bfloat16
        a, b = (np.asarray(each, np.float32).ravel() for each in (exact, half))
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.999


def test_a_repeated_config_comes_first():
    """As in transformers: text_config_dict, then its defaults, then text_config."""
    values = {
        "text_config": {"hidden_size": 32, "eos_token_id": 2, "vocab_size": 50},
        "text_config_dict": {"hidden_size": 64},
        "vision_config_dict": None,
    }
    text = OurConfig.from_dict(values).text_config
    theirs = CLIPConfig(**values).text_config
    for name in ("hidden_size", "eos_token_id", "vocab_size"):
        assert getattr(text, name) == getattr(theirs, name), name
    assert (text.hidden_size, text.eos_token_id) == (64, 49407)


def test_the_config_must_be_supported():
    with pytest.raises(ValueError, match='hidden_act=.mish. .supported: `"gelu"` or'):
        CLIPTextModel.config_class.from_dict({"hidden_act": "mish"})
    with pytest.raises(ValueError, match="image_size=.*a whole number"):
        VisionTower.config_class.from_dict({"image_size": [224, 224]})
    with pytest.raises(ValueError, match="pruned_heads"):
        CLIPTextModel.config_class.from_dict({"pruned_heads": {"0": [1]}})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_vision_model(tmp_path, activation):
    twin = spread(TorchVision(CLIPVisionConfig(**VISION, hidden_act=activation)))
    twin.save_pretrained(tmp_path)
    graph, params = load_model(VisionTower, tmp_path)
    out = twin(torch_pixels())
    hidden, pooled = jax.jit(lambda p: nnx.merge(graph, p)(make_pixels()))(params)
    assert relative_error(hidden, out.last_hidden_state) <= 1e-5
    assert relative_error(pooled, out.pooler_output) <= 1e-5
    assert_loads_back(VisionTower, twin, params, tmp_path)


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
