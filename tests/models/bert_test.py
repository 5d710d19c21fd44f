"""BERT equals transformers: hidden states of padded texts, weights both ways, released keys."""

import math
import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from agfsync_jax.models.bert import BertConfig, BertModel
from agfsync_jax.weights.networks import abstract_model, checkpoint_table, load_model, save_model
from tests.twins import relative_error, unit_gain

LENGTH = 40
_COMMON = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
# As on the hub, and the parameters of their files.
RELEASED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        _COMMON
        | {
            "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_attention_heads": 12,
            "num_hidden_layers": 6,
            "transformers_version": "4.8.2",
        },
        22_713_216,
    ),
    "BAAI/bge-large-en-v1.5": (
        _COMMON
        | {
            "_name_or_path": "BAAI/bge-large-en",
            "classifier_dropout": None,
            "hidden_size": 1024,
            "id2label": {"0": "LABEL_0"},
            "intermediate_size": 4096,
            "label2id": {"LABEL_0": 0},
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "torch_dtype": "float32",
            "transformers_version": "4.30.0",
        },
        335_141_888,
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The torch model, its folder, and ours loaded from there as (jitted function, parameters)."""
    from transformers import BertConfig as TorchConfig
    from transformers import BertModel as TorchBert

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 50, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    twin = unit_gain(TorchBert(TorchConfig(**sizes)))
    folder = tmp_path_factory.mktemp("bert")
    twin.save_pretrained(folder)
    graph, params = load_model(BertModel, folder)
    return twin, folder, jax.jit(lambda p, *x: nnx.merge(graph, p)(*x)), params


def make_batch():
    """Three texts of 40, 31 and 2 tokens, padded with 0."""
    ids = np.random.default_rng(1).integers(1, 50, (3, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH)[None] < np.array([[LENGTH], [31], [2]])).astype(np.int32)
    return np.where(mask, ids, 0), mask


def test_equals_transformers(pair):
    twin, _, run, params = pair
    ids, mask = make_batch()
    with torch.no_grad():
        expected = twin(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())[0]
    assert relative_error(run(params, ids, mask), expected) <= 1e-5


def test_masked_tokens_change_nothing(pair):
    _, _, run, params = pair
    ids, mask = make_batch()
    others = np.where(mask, ids, 7)
    states, same = run(params, ids, mask), run(params, others, mask)
    np.testing.assert_array_equal(states[mask > 0], same[mask > 0])
    everything = run(params, others, np.ones_like(mask))
    assert np.abs(everything[1, :31] - states[1, :31]).max() > 0.1


def test_weights_go_back_to_torch(pair, tmp_path):
    twin, _, _, params = pair
    save_model(BertModel, tmp_path, params, twin.config.to_dict())
    saved = load_file(tmp_path / "model.safetensors")
    expected = {k: v.numpy() for k, v in twin.state_dict().items() if not k.startswith("pooler.")}
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_key_is_placed(name):
    """Built without memory; files of older versions hold the position ids too."""
    from transformers import BertConfig as TorchConfig
    from transformers import BertModel as TorchBert

    written, parameters = RELEASED[name]
    with torch.device("meta"):
        twin = TorchBert(TorchConfig.from_dict(written))
    released = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    assert sum(map(math.prod, released.values())) == parameters
    released["embeddings.position_ids"] = (1, 512)
    config = BertConfig.from_dict(written)
    assert config.max_length == 512
    table = checkpoint_table(abstract_model(BertModel, config)[1])
    ours = {key: shape for key, (_, _, shape) in table.items()}
    ignored = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert ours == {key: shape for key, shape in released.items() if key not in ignored}
    assert all(any(re.fullmatch(p, key) for p in BertModel.ignored_keys) for key in ignored)


def test_errors(pair):
    _, _, run, params = pair
    with pytest.raises(ValueError, match=r"position_embedding_type='relative_key' .*: 'absolute'"):
        BertConfig.from_dict({"position_embedding_type": "relative_key"})
    ids = np.full((1, LENGTH + 1), 2, np.int32)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens.* {LENGTH} at most"):
        run(params, ids, np.ones_like(ids))
