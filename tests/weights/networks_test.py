"""Weights in and out: every problem of a folder is found, and all are told at once."""

import itertools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from agfsync_jax.models.clip import CLIPTextConfig, CLIPTextModel
from agfsync_jax.models.t5 import T5ForConditionalGeneration
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.weights import tensor_files
from agfsync_jax.weights.networks import (
    Fitted,
    find_tensors,
    fit,
    init_model,
    load_model,
    save_model,
)
from agfsync_jax.weights.places import resolve_path
from agfsync_jax.weights.tensor_files import from_array
from tests.processes import run_processes
from tests.twins import tiny_t5

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}


def fitted_folder(folder, config=CONFIG):
    return fit(CLIPTextModel, CLIPTextConfig.from_dict(config), find_tensors(folder))


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


def test_each_device_reads_its_rows_alone(folder, monkeypatch):
    """Rows of the file are output features: what the shipped rules split."""
    mesh = create_mesh({"data": 1, "fsdp": 4, "tensor": 1}, devices=jax.devices()[:4])
    read = []
    preadv = tensor_files.os.preadv

    def counting(descriptor, buffers, offset):
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(descriptor, buffers, offset)

    rules = [("kernel$", (None, "fsdp")), ("embedding$", ("fsdp",)), ("", ())]
    fitted = fitted_folder(folder)
    monkeypatch.setattr(tensor_files.os, "preadv", counting)
    fitted.read(shardings=lambda shapes: infer_shardings(shapes, mesh, rules))
    assert sum(read) == fitted.nbytes  # no part twice, replicated ones included
    assert max(read) <= 32 * 16 * 4 / 4


def test_files_in_several_parts(folder, tmp_path):
    _, params = load_model(CLIPTextModel, folder)
    save_model(CLIPTextModel, tmp_path / "parts", params, CONFIG, max_shard_size=4000)
    names = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    _, again = load_model(CLIPTextModel, tmp_path / "parts")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))
    from transformers import CLIPTextModel as Torch

    config = {**CONFIG, "model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}
    (tmp_path / "parts" / "config.json").write_text(json.dumps(config))
    twin = Torch.from_pretrained(tmp_path / "parts")
    expected = params["text_model"]["embeddings"]["token_embedding"]["embedding"][...]
    weight = dict(twin.named_parameters())
    weight = next(value for key, value in weight.items() if "token_embedding" in key)
    np.testing.assert_array_equal(weight.detach().numpy(), expected)
    (tmp_path / "parts" / names[1]).unlink()
    (tmp_path / "parts" / names[2]).write_bytes(b"short")
    with pytest.raises(ValueError) as error:
        load_model(CLIPTextModel, tmp_path / "parts")
    assert names[1] in str(error.value) and names[2] in str(error.value)


def test_variants_and_pickles(folder):
    tensors = load_file(folder / "model.safetensors")
    _, expected = load_model(CLIPTextModel, folder)
    with pytest.raises(FileNotFoundError, match="variant 'fp16'.*there is model.safetensors"):
        load_model(CLIPTextModel, folder, variant="fp16")
    half = {key: value.astype(np.float16) for key, value in tensors.items()}
    save_file(half, folder / "model.fp16.safetensors")
    _, params = load_model(CLIPTextModel, folder, variant="fp16")
    same = jax.tree.map(lambda a, b: bool((a.astype(jnp.float16) == b).all()), expected, params)
    assert jax.tree.all(same)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there is model.fp16.safetensors. Set the variant"):
        load_model(CLIPTextModel, folder)
    torch.save(
        {key: torch.from_numpy(value) for key, value in tensors.items()},
        folder / "pytorch_model.bin",
    )
    _, params = load_model(CLIPTextModel, folder)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), expected, params))


def test_one_parameter_under_two_spellings(folder):
    def edit(tensors):
        key = "text_model.final_layer_norm.bias"
        tensors[key.removeprefix("text_model.")] = tensors[key].copy()

    change(folder, edit)
    with pytest.raises(ValueError, match="twice .*final_layer_norm.bias"):
        load_model(CLIPTextModel, folder)


def test_integers_are_no_weights(folder):
    key = "text_model.final_layer_norm.bias"
    change(folder, lambda tensors: tensors.update({key: np.ones(16, np.int8)}))
    with pytest.raises(ValueError, match="wrong dtype .*final_layer_norm.bias: int8"):
        load_model(CLIPTextModel, folder)


def test_host_memory_while_loading(tmp_path):
    """One tensor or two a thread beside what is held; the benchmark measures real sizes."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    _, params = init_model(CLIPTextModel, CLIPTextConfig.from_dict(config))
    save_model(CLIPTextModel, tmp_path, params, config, dtype=np.float16)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    del params
    fitted = fitted_folder(tmp_path, config)
    tracemalloc.start()
    loaded = fitted.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == held
    assert held / 2 < peak <= 1.2 * held  # below it, tracemalloc would have seen no array


@pytest.mark.parametrize("kept", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_a_tied_table_may_have_any_of_its_names(tmp_path, kept):
    """Of several names of a tensor, safetensors keep one, and not always the same."""
    twin = tiny_t5()
    twin.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("shared.weight")
    save_file({**tensors, f"{kept}.weight": table}, tmp_path / "model.safetensors")
    _, params = load_model(T5ForConditionalGeneration, tmp_path)
    np.testing.assert_array_equal(params["shared"]["embedding"][...], table)


def test_every_float16_number_is_read_as_the_same_float32_number():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for halves in (every, finite[: 2 * 31744].reshape(31744, 2), every.reshape(64, 32, 32)):
        for axes in itertools.permutations(range(halves.ndim)):
            view = halves.transpose(axes)
            abstract = nnx.State({"x": nnx.Param(jax.ShapeDtypeStruct(view.shape, np.float32))})
            params = Fitted(None, abstract, {("x",): from_array("x", view)}).read()
            read = np.asarray(params["x"][...])
            assert read.dtype == np.float32
            np.testing.assert_array_equal(read, view.astype(np.float32))
            np.testing.assert_array_equal(np.signbit(read), np.signbit(view))


PROCESS = """
import json, sys
from pathlib import Path
from agfsync_jax.parallel import multihost
multihost.initialize()
import jax
from agfsync_jax.models.clip import CLIPTextConfig, CLIPTextModel
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import infer_shardings
from agfsync_jax.weights import tensor_files
from agfsync_jax.weights.networks import find_tensors, fit, save_model

folder = Path(sys.argv[1])
read, preadv = [], tensor_files.os.preadv
def counting(descriptor, buffers, offset):
    read.append(sum(len(buffer) for buffer in buffers))
    return preadv(descriptor, buffers, offset)
mesh = create_mesh({"fsdp": 4})
rules = [("kernel$", (None, "fsdp")), ("embedding$", ("fsdp",)), ("", ())]
config = json.loads((folder / "config.json").read_text())
fitted = fit(CLIPTextModel, CLIPTextConfig.from_dict(config), find_tensors(folder))
tensor_files.os.preadv = counting
params = fitted.read(shardings=lambda abstract: infer_shardings(abstract, mesh, rules))
save_model(CLIPTextModel, folder / "again", params, config)
multihost.barrier("saved")
print(json.dumps({"read": sum(read), "whole": fitted.nbytes}))
"""


def test_two_processes_read_their_own_rows_and_save_one_file(folder):
    outs = run_processes(PROCESS, folder)
    tensors = load_file(folder / "model.safetensors")
    split = sum(value.nbytes for value in tensors.values() if value.ndim > 1)
    for out in outs:
        assert out["read"] == split / 2 + out["whole"] - split
    again = load_file(folder / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)
    assert sorted(path.name for path in (folder / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
