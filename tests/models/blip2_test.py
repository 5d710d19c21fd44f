"""BLIP-2 equals transformers: image tokens, logits, gradients, weights both ways, greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Blip2ForConditionalGeneration as TorchBlip2

from agfsync_jax.models.blip2 import Blip2Config, Blip2ForConditionalGeneration
from agfsync_jax.weights.networks import abstract_model, load_model, save_model
from tests.twins import random_params, tiny_blip2

FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dense_act_fn": "gelu"}
VARIANTS = {"classic": {}, "flan": FLAN}


def make_batch(seed=1, batch=4, length=13, answer=5):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(batch, 16, 16, 3)).astype(np.float32)
    ids = rng.integers(2, 60, (batch, length)).astype(np.int32)
    mask = (np.arange(length) < rng.integers(4, length, batch)[:, None]).astype(np.int32)
    decoder_ids = rng.integers(2, 60, (batch, answer)).astype(np.int32)
    decoder_ids[:, 0] = 0
    return pixels, ids, mask, decoder_ids


def torch_inputs(twin, pixels, ids, mask):
    """transformers' layout: placeholders before the text, channels first."""
    count = twin.config.num_query_tokens
    placeholders = np.full((len(ids), count), twin.config.image_token_index)
    return {
        "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "input_ids": torch.from_numpy(np.concatenate([placeholders, ids], 1)).long(),
        "attention_mask": torch.from_numpy(np.pad(mask, ((0, 0), (count, 0)), constant_values=1)),
    }


def run_torch(twin, pixels, ids, mask, decoder_ids):
    inputs = torch_inputs(twin, pixels, ids, mask)
    return twin(**inputs, decoder_input_ids=torch.from_numpy(decoder_ids).long()).logits


def max_error(actual, expected):
    """Largest difference as a share of the largest expected value."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradient(tmp_path, variant):
    twin = tiny_blip2(text=VARIANTS[variant])
    twin.save_pretrained(tmp_path)
    if variant == "flan":
        twin = with_own_head(tmp_path)
    graph, params = load_model(Blip2ForConditionalGeneration, tmp_path)
    batch = make_batch()

    tokens = jax.jit(lambda p, x: nnx.merge(graph, p).get_image_tokens(x))(params, batch[0])
    torch_pixels = torch.from_numpy(batch[0]).permute(0, 3, 1, 2)
    expected = twin.get_image_features(torch_pixels).pooler_output.detach()
    assert tokens.shape == (4, 5, 32)
    assert expected.std() > 0.1 and (expected - expected[:1]).std() > 0.1
    assert max_error(tokens, expected) <= 1e-5

    expected = run_torch(twin, *batch)
    actual = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, *batch)
    assert max_error(actual, expected.detach()) <= 1e-5

    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(*batch) * weights).sum()))(params)
    assert max_error(grads["query_tokens"][...], twin.query_tokens.grad) <= 1e-4
    vision, torch_vision = grads["vision_model"]["embeddings"], twin.vision_model.embeddings
    for name in ("class_embedding", "position_embedding"):
        assert max_error(vision[name][...], getattr(torch_vision, name).grad) <= 1e-4
    kernel = vision["patch_embedding"]["kernel"][...].transpose(3, 2, 0, 1)
    assert max_error(kernel, torch_vision.patch_embedding.weight.grad) <= 1e-4
    key = grads["qformer"]["encoder"]["layer"][2]["crossattention"]["attention"]["key"]["kernel"]
    expected = twin.qformer.encoder.layer[2].crossattention.attention.key.weight.grad
    assert max_error(key[...].T, expected) <= 1e-4


def with_own_head(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"] = torch.randn(64, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return TorchBlip2.from_pretrained(folder).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_go_back_to_torch(tmp_path, variant):
    config = tiny_blip2(text=VARIANTS[variant]).config.to_dict()
    parsed = Blip2Config.from_dict(config)
    graph, params = abstract_model(Blip2ForConditionalGeneration, parsed)
    params = random_params(params)
    save_model(Blip2ForConditionalGeneration, tmp_path, params, config)
    back, info = TorchBlip2.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    batch = make_batch(3)
    actual = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, *batch)
    with torch.no_grad():
        assert max_error(actual, run_torch(back.eval(), *batch)) <= 1e-5


def test_an_image_is_read_once_for_many_questions(tmp_path):
    twin = tiny_blip2()
    twin.save_pretrained(tmp_path)
    graph, params = load_model(Blip2ForConditionalGeneration, tmp_path)
    pixels, ids, mask, decoder_ids = make_batch(5)
    image = np.array([1, 1, 0, 1])

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        tokens = model.get_image_tokens(jnp.asarray(pixels[:2]))
        return model.forward(tokens[image], ids, mask, decoder_ids)

    actual = run(params)
    with torch.no_grad():
        expected = run_torch(twin, pixels[image], ids, mask, decoder_ids)
    assert max_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_generate(tmp_path, variant):
    twin = tiny_blip2(text=VARIANTS[variant])
    twin.save_pretrained(tmp_path)
    if variant == "flan":
        twin = with_own_head(tmp_path)
    graph, params = load_model(Blip2ForConditionalGeneration, tmp_path)
    pixels, ids, mask, _ = make_batch(6, batch=10)

    @jax.jit
    def generate(params, pixels, ids, mask):
        model = nnx.merge(graph, params)
        return model.generate(model.get_image_tokens(pixels), ids, mask, 8)

    actual = np.asarray(generate(params, pixels, ids, mask))
    inputs = torch_inputs(twin, pixels, ids, mask)
    expected = twin.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=8)
    expected = expected.numpy()[:, 1:]
    np.testing.assert_array_equal(actual, np.pad(expected, ((0, 0), (0, 8 - expected.shape[1]))))
    assert len(np.unique(actual, axis=0)) > 3


def test_wrong_image_size():
    config = Blip2Config.from_dict(tiny_blip2().config.to_dict())
    graph, params = abstract_model(Blip2ForConditionalGeneration, config)
    with pytest.raises(ValueError, match=r"\(8, 8, 3\), the vision model takes \(16, 16, 3\)"):
        nnx.merge(graph, params).get_image_tokens(jnp.zeros((1, 8, 8, 3)))


def test_other_text_models_are_refused():
    with pytest.raises(ValueError, match="model_type='opt'"):
        Blip2Config.from_dict({"text_config": {"model_type": "opt"}})
