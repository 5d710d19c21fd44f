"""Random weights: real sizes, the same numbers however they are read, and networks that load."""

import math

import numpy as np
import pytest

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.backbones.stable_diffusion_xl import StableDiffusionXL
from agfsync_jax.data.images import preprocessing
from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.models.blip2 import Blip2Config
from agfsync_jax.scorers.aesthetic import load_head
from agfsync_jax.weights import random_weights, skeletons
from agfsync_jax.weights.clip_files import ClipFiles
from agfsync_jax.weights.networks import find_tensors, read_json
from agfsync_jax.weights.tensor_files import open_tensors
from tests.released import CHECKPOINTS


def test_numbers_do_not_depend_on_how_they_are_read(tmp_path):
    path = tmp_path / "model.shapes.json"
    path.write_text(
        '{"a.fc.weight": [1500, 1000], "b.fc.weight": [1500, 1000], "a.norm.bias": [7]}'
    )
    tensors = open_tensors(path)
    whole = tensors["a.fc.weight"].read()
    parts = [tensors["a.fc.weight"].read([slice(i, i + 300), slice(5, 9)]) for i in (0, 900)]
    np.testing.assert_array_equal(whole[:300, 5:9], parts[0])
    np.testing.assert_array_equal(whole[900:1200, 5:9], parts[1])
    flipped = tensors["a.fc.weight"].transpose(1, 0).read([slice(0, 2), slice(3, 5)])
    np.testing.assert_array_equal(flipped, whole[3:5, :2].T)
    assert np.std(whole.astype(np.float32)) == pytest.approx(1000**-0.5, rel=0.01)
    assert not np.array_equal(whole, tensors["b.fc.weight"].read())
    assert len(np.unique(whole, axis=0)) == len(whole)
    assert not tensors["a.norm.bias"].read().any()


@pytest.mark.parametrize(
    ("kind", "backbone", "parts"),
    [
        ("stable-diffusion-v1-5", StableDiffusion, {"unet": 859_520_964, "vae": 83_653_863}),
        ("stable-diffusion-2", StableDiffusion, {"unet": 865_910_724, "vae": 83_653_863}),
        ("stable-diffusion-xl-base", StableDiffusionXL, {"unet": 2_567_463_684}),
    ],
)
def test_a_pipeline_has_its_sizes(kind, backbone, parts, tmp_path):
    random_weights.write_pipeline(kind, tmp_path, backbone.networks)
    fitted = backbone.inspect(backbone.open(tmp_path))
    counted = {
        name: sum(math.prod(tensor.shape) for tensor in each.tensors.values())
        for name, each in fitted.items()
    }
    assert parts.items() <= counted.items()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.shapes.json")) < 2**20


def test_a_clip_has_its_sizes(tmp_path):
    random_weights.write_model("clip-vit-large-patch14", tmp_path)
    files = ClipFiles(tmp_path)
    released = CHECKPOINTS["openai/clip-vit-large-patch14"]["clip"].parameters
    assert sum(math.prod(tensor.shape) for tensor in files.tensors.values()) == released
    assert files.tokenize(["a cat"]).shape == (1, 77)


def test_a_blip2_has_its_sizes_and_a_tokenizer(tmp_path):
    random_weights.write_model("blip2-flan-t5-xl", tmp_path)
    sizes = Blip2Config.from_dict(read_json(tmp_path / "config.json"))
    count = sum(math.prod(tensor.shape) for tensor in find_tensors(tmp_path).values())
    assert count == pytest.approx(3.94e9, rel=0.01)
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.vocab_size <= sizes.text_config.vocab_size
    assert {len(tokenizer.encode(word, special=False)) for word in ("yes", "no")} == {1}
    text = "Question: Is the cat orange? Choices:['yes','no'] Answer:"
    assert len(tokenizer.encode(text)) == pytest.approx(23, abs=3)  # T5's own has 23
    assert tokenizer.decode(tokenizer.encode("is it there?")).startswith("is")
    assert preprocessing(tmp_path)["size"] == skeletons.BLIP2_RESIZE["size"]


def test_a_head(tmp_path):
    _, params = load_head(random_weights.write_head(tmp_path / "head"))
    assert params["layers"][0]["kernel"].shape == (768, 1024)


def test_every_name_is_written(tmp_path):
    for name in random_weights.NAMES:
        random_weights.write_model(name, tmp_path / name)
        assert find_tensors(tmp_path / name)
