"""Weights in and out: every problem of a folder is found, and all are told at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agfsync_jax.models.clip import CLIPTextConfig, CLIPTextModel
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.utils.weights import init_model, load_model, resolve_path, save_model

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}


@pytest.fixture
def folder(tmp_path):
    _, params = init_model(CLIPTextModel, CLIPTextConfig.from_dict(CONFIG))
    save_model(CLIPTextModel, tmp_path, params, CONFIG)
    return tmp_path


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_round_trip_is_exact(folder):
    _, expected = init_model(CLIPTextModel, CLIPTextConfig.from_dict(CONFIG))
    _, loaded = load_model(CLIPTextModel, folder)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, loaded))
    _, half = load_model(CLIPTextModel, folder, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}


def test_all_problems_are_listed_at_once(folder):
    def edit(tensors):
        del tensors["text_model.final_layer_norm.bias"]
        tensors["text_model.embeddings.token_embedding.weight"] = np.zeros((31, 16), np.float32)
        tensors["text_model.encoder.layers.0.mlp.fc1.weight"] = np.zeros((16, 24), np.float32)
        tensors["text_model.pooler.weight"] = np.zeros(3, np.float32)

    change(folder, edit)
    with pytest.raises(ValueError) as error:
        load_model(CLIPTextModel, folder)
    text = str(error.value)
    assert "4 problems" in text
    assert "token_embedding.weight: [31, 16], expected [32, 16]" in text
    assert "fc1.weight: [16, 24], expected [24, 16]" in text
    assert "not in model  text_model.pooler.weight" in text
    assert "not in file   text_model.final_layer_norm.bias" in text


def test_a_key_that_holds_no_parameter_is_ignored(folder):
    change(folder, lambda t: t.update({"text_model.embeddings.position_ids": np.zeros(8, "i8")}))
    load_model(CLIPTextModel, folder)


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(CLIPTextModel, folder)


def test_a_missing_folder_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="Hugging Face layout"):
        resolve_path(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No config.json"):
        load_model(CLIPTextModel, tmp_path)


def test_tensors_go_to_their_shardings(folder):
    mesh = create_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    rules = [("fc1.kernel", (None, "fsdp"))]
    _, params = load_model(
        CLIPTextModel, folder, shardings=lambda shapes: infer_shardings(shapes, mesh, rules)
    )
    mlp = params["text_model"]["encoder"]["layers"][0]["mlp"]
    kernel, bias = mlp["fc1"]["kernel"][...], mlp["fc1"]["bias"][...]
    assert kernel.addressable_shards[0].data.shape == (16, 3)
    assert bias.sharding.is_fully_replicated
