"""T5 equals transformers: logits, gradients, weights both ways, greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5ForConditionalGeneration as TorchT5

from agfsync_jax.models.t5 import T5Config, T5ForConditionalGeneration
from agfsync_jax.weights.networks import abstract_model, load_model, save_model
from tests.twins import random_params, tiny_t5

CLASSIC = {}
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {"classic": CLASSIC, "flan": FLAN, "blip2": {**FLAN, "dense_act_fn": "gelu"}}


def make_pair(tmp_path, changes):
    """The torch model, and ours loaded from the folder that it saved."""
    twin = tiny_t5(**changes)
    twin.save_pretrained(tmp_path)
    if changes.get("tie_word_embeddings") is False:
        # transformers ties a fresh model's head; Flan's files carry one of its own
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(64, 32)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        twin = TorchT5.from_pretrained(tmp_path).eval()
        assert not torch.equal(twin.lm_head.weight, twin.shared.weight)
    return twin, *load_model(T5ForConditionalGeneration, tmp_path)


def make_batch(seed=1, batch=3, length=21, answer=9):
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, 63, (batch, length)).astype(np.int32)
    mask = (np.arange(length) < rng.integers(4, length, batch)[:, None]).astype(np.int32)
    decoder_ids = rng.integers(2, 63, (batch, answer)).astype(np.int32)
    decoder_ids[:, 0] = 0
    return ids, mask, decoder_ids


def run_torch(twin, ids, mask, decoder_ids):
    ids, mask, decoder_ids = (torch.from_numpy(x).long() for x in (ids, mask, decoder_ids))
    return twin(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits


def max_error(actual, expected):
    """Largest difference as a share of the largest expected value."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradient(tmp_path, variant):
    twin, graph, params = make_pair(tmp_path, VARIANTS[variant])
    batch = make_batch()
    expected = run_torch(twin, *batch)
    actual = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, *batch)
    assert expected.std() > 0.1
    assert max_error(actual, expected.detach()) <= 1e-5

    weights = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(*batch) * weights).sum()))(params)
    for name in (
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.v",
    ):
        leaf = grads
        for part in name.split("."):
            leaf = leaf[int(part) if part.isdigit() else part]
        assert max_error(leaf["kernel"][...].T, twin.get_submodule(name).weight.grad) <= 1e-4
    bias = "decoder.block.0.layer.0.SelfAttention"
    leaf = grads["decoder"]["block"][0]["layer"][0]["SelfAttention"]["relative_attention_bias"]
    expected = twin.get_submodule(bias).relative_attention_bias.weight.grad
    assert max_error(leaf["embedding"][...], expected) <= 1e-4
    assert max_error(grads["shared"]["embedding"][...], twin.shared.weight.grad) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_go_back_to_torch(tmp_path, variant):
    twin, _, _ = make_pair(tmp_path, VARIANTS[variant])
    config = T5Config.from_dict(twin.config.to_dict())
    graph, params = abstract_model(T5ForConditionalGeneration, config)
    params = random_params(params)
    save_model(T5ForConditionalGeneration, tmp_path / "ours", params, twin.config.to_dict())
    back, info = TorchT5.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    batch = make_batch(3)
    actual = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, *batch)
    with torch.no_grad():
        assert max_error(actual, run_torch(back.eval(), *batch)) <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_generate(tmp_path, variant):
    twin, _, params = make_pair(tmp_path, VARIANTS[variant])
    ids, mask, _ = make_batch(4, batch=12)

    end = 1  # the usual end token, then one that the twin really says
    for _ in range(2):
        config = T5Config.from_dict({**twin.config.to_dict(), "eos_token_id": end})
        graph, _ = abstract_model(T5ForConditionalGeneration, config)

        @jax.jit
        def generate(params, ids, mask, graph=graph):
            model = nnx.merge(graph, params)
            return model.generate(model.encode(model.shared(ids), mask), mask, 10)

        twin.generation_config.eos_token_id = end
        actual = np.asarray(generate(params, ids, mask))
        expected = twin.generate(
            input_ids=torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask).long(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=10,
        ).numpy()[:, 1:]
        expected = np.pad(expected, ((0, 0), (0, 10 - expected.shape[1])))
        np.testing.assert_array_equal(actual, expected)
        end = int(np.bincount(actual[:, 2:6].ravel(), minlength=64).argmax())
    assert (actual[:, -1] == 0).any()  # some rows ended early
    assert len(np.unique(actual, axis=0)) > 1


def test_half_precision_is_as_close_as_torch(tmp_path):
    twin, _, _ = make_pair(tmp_path, FLAN)
    batch = make_batch()
    with torch.no_grad():
        exact = run_torch(twin, *batch).numpy()
        torch_half = run_torch(twin.bfloat16(), *batch).float().numpy()
    graph, params = load_model(T5ForConditionalGeneration, tmp_path, dtype=jnp.bfloat16)
    half = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, *batch)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).mean() <= 1.5 * np.abs(torch_half - exact).mean()


def test_config_errors():
    with pytest.raises(ValueError, match="feed_forward_proj='gated-silu' .*`\"relu\"` or"):
        T5Config.from_dict({"feed_forward_proj": "gated-silu"})
    with pytest.raises(ValueError, match="unknown_words=3"):
        T5Config.from_dict({"unknown_words": 3})
