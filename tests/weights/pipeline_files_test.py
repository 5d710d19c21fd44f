"""Whole checkpoints: folders, single files, URLs; and every way in which one can be broken."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from etils import epath
from safetensors.torch import load_file, save_file

from agfsync_jax.backbones import stable_diffusion, stable_diffusion_xl
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.weights import pipeline_files
from agfsync_jax.weights import places as paths
from tests.twins import tiny_stable_diffusion, tiny_stable_diffusion_xl

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(path, **kwargs):
    return stable_diffusion.Backbone.load(path, **kwargs)


def same(first, second):
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), first.params, second.params)
    assert jax.tree.all(equal)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_everything_wrong_is_told_at_once_before_a_tensor_is_read(folder, monkeypatch):
    """A truncated file, a wrong shape, a missing tensor, a foreign one, missing parts."""
    (folder / VAE).write_bytes((folder / VAE).read_bytes()[:-10])
    shutil.rmtree(folder / "tokenizer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text()) | {"beta_schedule": "sigmoid"}
    scheduler.write_text(json.dumps(values))

    def change(tensors):
        del tensors["conv_in.bias"]
        tensors["conv_out.weight"] = torch.zeros(4, 16, 1, 1)
        tensors["another.weight"] = torch.zeros(3)

    edit(folder / UNET, change)
    shutil.rmtree(folder / "text_encoder")
    monkeypatch.setattr("agfsync_jax.weights.networks.Fitted.read", None)
    with pytest.raises(ValueError) as error:
        load(folder)
    text = str(error.value)
    for part in (
        "diffusion_pytorch_model.safetensors is not a whole safetensors file",
        "3 problems",
        "wrong shape   conv_out.weight: [4, 16, 1, 1], expected [4, 16, 3, 3]",
        "not in model  another.weight [3]",
        "not in file   conv_in.bias",
        f"No config.json in {folder}/text_encoder",
        f"No tokenizer in {folder}/tokenizer",
        "beta_schedule='sigmoid'",
    ):
        assert part in text, part


def test_a_lora_of_another_model_is_told_before_a_tensor_is_read(folder, tmp_path, monkeypatch):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    shapes = {"lora_A": (2, 2048), "lora_B": (16, 2)}
    tensors = {f"{name}.{factor}.weight": torch.ones(shape) for factor, shape in shapes.items()}
    save_file(tensors, tmp_path / "xl.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    monkeypatch.setattr("agfsync_jax.weights.networks.Fitted.read", None)
    files = [(tmp_path / "xl.safetensors", 1.0), (tmp_path / "broken.safetensors", 1.0)]
    with pytest.raises(ValueError) as error:
        load(folder, lora=files)
    assert "SDXL" in str(error.value) and "broken.safetensors" in str(error.value)


def test_a_lora_is_added_with_its_scale(original, tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    tensors = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")

    def kernel(backbone):
        block = backbone.params["unet"]["down_blocks"][0]["attentions"][0]
        return np.asarray(block["transformer_blocks"][0]["attn1"]["to_q"]["kernel"][...])

    mesh = create_mesh({"data": 2, "fsdp": 4})
    placed = {"mesh": mesh, "rules": [(r"to_q\.kernel", (None, "fsdp"))]}
    plain = load(original, **placed)
    adapted = load(original, lora=[(tmp_path / "lora.safetensors", 0.5)], **placed)
    same_places = jax.tree.map(lambda a, b: a.sharding == b.sharding, plain.params, adapted.params)
    assert jax.tree.all(same_places)
    expected = kernel(plain) + 0.5 * (up @ down).numpy().T
    np.testing.assert_allclose(kernel(adapted), expected, rtol=1e-5, atol=1e-6)


def test_a_url_is_streamed(original, monkeypatch):
    real = epath.Path

    def path(text):
        return real(text.replace("gs://bucket", str(original.parent)))

    monkeypatch.setattr(epath, "Path", path)
    backbone = load("gs://bucket/model")
    same(backbone, load(original))
    copied = [file.name for file in paths.local_files(path("gs://bucket/model")).rglob("*.*")]
    assert "vocab.json" in copied and not [name for name in copied if "safetensors" in name]


def test_a_variant(original, folder):
    for path in folder.rglob("*.safetensors"):
        half = {key: value.half() for key, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    backbone = load(folder, variant="fp16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16), load(original).params)
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), backbone.params, rounded)
    assert jax.tree.all(equal)
    with pytest.raises(ValueError, match="Set the variant") as error:
        load(folder)
    assert str(error.value).count("Set the variant") == 3  # one a part


def single_file(folder, path, prefixes):
    """One file of a folder's networks, each with what its keys are to begin with."""
    tensors = {}
    for part, prefix in prefixes.items():
        (file,) = (folder / part).glob("*.safetensors")
        tensors |= {f"{prefix}{key}": value.clone() for key, value in load_file(file).items()}
    save_file(tensors, path)


@pytest.fixture
def renamed(monkeypatch):
    """Stands in for the layouts, which have tests of their own: parts by their prefix."""

    def split(tensors, kind):
        parts = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("|")
            parts.setdefault(part, {})[name] = tensor
        return kind or "found", parts

    monkeypatch.setattr(pipeline_files, "split_single_file", split)


@pytest.mark.parametrize("xl", [False, True])
def test_a_single_file_takes_its_configs_from_the_skeleton(tmp_path, renamed, monkeypatch, xl):
    folder = tmp_path / "model"
    (tiny_stable_diffusion_xl if xl else tiny_stable_diffusion)(folder)
    backbone = (stable_diffusion_xl if xl else stable_diffusion).Backbone
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if xl else [])]
    single_file(folder, tmp_path / "all.safetensors", {part: f"{part}|" for part in parts})
    kinds = []

    def write_skeleton(kind, target):
        kinds.append(kind)
        shutil.copytree(
            folder, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
        )

    monkeypatch.setattr(pipeline_files.skeletons, "write_skeleton", write_skeleton)
    loaded = backbone.load(tmp_path / "all.safetensors", kind="mine")
    same(loaded, backbone.load(folder))
    assert kinds == ["mine"]
    loaded.save(tmp_path / "saved", loaded.params)
    same(backbone.load(tmp_path / "saved"), loaded)
    tokens = backbone.tokenizer(backbone.open(tmp_path / "all.safetensors"))(["red circle"])
    np.testing.assert_array_equal(tokens, loaded.tokenize(["red circle"]))
