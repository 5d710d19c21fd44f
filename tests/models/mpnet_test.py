"""MPNet equals transformers: hidden states of padded texts, weights both ways, released keys."""

import math
import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from agfsync_jax.models.mpnet import MPNetConfig, MPNetModel
from agfsync_jax.models.t5 import relative_position_buckets
from agfsync_jax.weights.networks import abstract_model, checkpoint_table, load_model, save_model
from tests.twins import relative_error, unit_gain

LENGTH = 140  # beyond the largest distance that has a bucket of its own
# sentence-transformers/all-mpnet-base-v2, as on the hub
RELEASED = {
    "_name_or_path": "microsoft/mpnet-base",
    "architectures": ["MPNetForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "mpnet",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "relative_attention_num_buckets": 32,
    "transformers_version": "4.8.2",
    "vocab_size": 30527,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The torch model, its folder, and ours loaded from there as (jitted function, parameters)."""
    from transformers import MPNetConfig as TorchConfig
    from transformers import MPNetModel as TorchMPNet

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 50, "num_attention_heads": 4, "max_position_embeddings": LENGTH + 2}
    twin = unit_gain(TorchMPNet(TorchConfig(**sizes, layer_norm_eps=1e-5)))
    folder = tmp_path_factory.mktemp("mpnet")
    twin.save_pretrained(folder)
    graph, params = load_model(MPNetModel, folder)
    return twin, folder, jax.jit(lambda p, *x: nnx.merge(graph, p)(*x)), params


def make_batch():
    """Three texts of 140, 31 and 2 tokens; one has a padding token in its middle too."""
    ids = np.random.default_rng(1).integers(2, 50, (3, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH)[None] < np.array([[LENGTH], [31], [2]])).astype(np.int32)
    ids = np.where(mask, ids, 1)
    ids[0, 17] = 1
    return ids, mask


def test_equals_transformers(pair):
    twin, _, run, params = pair
    ids, mask = make_batch()
    with torch.no_grad():
        expected = twin(torch.from_numpy(ids).long(), torch.from_numpy(mask).long())[0]
    assert relative_error(run(params, ids, mask), expected) <= 1e-5


def test_masked_tokens_change_nothing(pair):
    _, _, run, params = pair
    ids, mask = make_batch()
    others = np.where(mask, ids, (ids * 7 + np.arange(LENGTH)[None]) % 48 + 2)
    assert (others != ids).any()
    states, same = run(params, ids, mask), run(params, others, mask)
    np.testing.assert_array_equal(states[mask > 0], same[mask > 0])
    everything = run(params, others, np.ones_like(mask))
    assert np.abs(everything[1, :31] - states[1, :31]).max() > 0.1


def test_buckets_are_those_of_transformers():
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    position = torch.arange(512)
    expected = MPNetEncoder.relative_position_bucket(position[None] - position[:, None])
    actual = relative_position_buckets(512, bidirectional=True, num_buckets=32, max_distance=128)
    np.testing.assert_array_equal(actual, expected.numpy())


def test_weights_go_back_to_torch(pair, tmp_path):
    twin, _, _, params = pair
    save_model(MPNetModel, tmp_path, params, twin.config.to_dict())
    saved = load_file(tmp_path / "model.safetensors")
    expected = {k: v.numpy() for k, v in twin.state_dict().items() if not k.startswith("pooler.")}
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


def test_every_released_key_is_placed():
    """Of all-mpnet-base-v2, built without memory; its file holds the position ids too."""
    from transformers import MPNetConfig as TorchConfig
    from transformers import MPNetModel as TorchMPNet

    with torch.device("meta"):
        twin = TorchMPNet(TorchConfig.from_dict(RELEASED))
    released = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    released["embeddings.position_ids"] = (1, 514)
    config = MPNetConfig.from_dict(RELEASED)
    assert config.max_length == 512
    table = checkpoint_table(abstract_model(MPNetModel, config)[1])
    ours = {key: shape for key, (_, _, shape) in table.items()}
    ignored = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert ours == {key: shape for key, shape in released.items() if key not in ignored}
    assert all(any(re.fullmatch(p, key) for p in MPNetModel.ignored_keys) for key in ignored)
    assert sum(map(math.prod, released.values())) == 109_486_978  # 438 MB


def test_errors(pair):
    _, _, run, params = pair
    with pytest.raises(ValueError, match=r"relative_attention_num_buckets=16 .*: 32"):
        MPNetConfig.from_dict({"relative_attention_num_buckets": 16})
    with pytest.raises(ValueError, match=r"pad_token_id=0 .*: 1"):
        MPNetConfig.from_dict({"pad_token_id": 0})
    ids = np.full((1, LENGTH + 1), 2, np.int32)
    with pytest.raises(ValueError, match=f"{LENGTH + 1} tokens.* {LENGTH} at most"):
        run(params, ids, np.ones_like(ids))
