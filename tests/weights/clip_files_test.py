"""CLIP from any of its files: transformers' and open_clip's folders, weights alone."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agfsync_jax.data.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    pad_and_normalize,
    preprocessing,
    resize_and_normalize,
)
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import hpsv2
from agfsync_jax.scorers.clip import ClipEncoder
from agfsync_jax.weights import open_clip as layouts
from tests.twins import import_open_clip, spread

TEXTS = ["a photograph of an astronaut riding a horse", "two cats &amp; a dog!", ""]
MODEL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 40, "head_width": 20, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@pytest.fixture(scope="module")
def twin():
    torch.manual_seed(0)
    open_clip = import_open_clip()
    twin = spread(open_clip.CLIP(**MODEL))
    twin.tokenize = open_clip.SimpleTokenizer()
    return twin


@pytest.fixture
def architecture(monkeypatch):
    """A tiny architecture with a name, as the known ones are too large for a test."""
    named = layouts._named
    monkeypatch.setattr(
        layouts, "_named", lambda name: MODEL if name == "ViT-Tiny-8" else named(name)
    )
    return "ViT-Tiny-8"


@pytest.fixture(scope="module")
def mesh():
    return create_mesh({"data": 1}, devices=jax.devices()[:1])


def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)


def check(encoder, twin, pixels):
    """Embeddings equal open_clip's of the same pixels, and of its own tokens."""
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        image = twin.encode_image(pixels, normalize=True).numpy()
        text = twin.encode_text(twin.tokenize(TEXTS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.images(images()), image, atol=1e-5)
    np.testing.assert_allclose(encoder.texts(TEXTS), text, atol=1e-5)


@pytest.mark.parametrize("name", ["HPS_v2.1.pt", "open_clip_model.safetensors"])
def test_weights_alone_with_the_name_of_their_architecture(
    twin, mesh, tmp_path, architecture, name
):
    """HPSv2: an open_clip state under "state_dict" in a pickle, its pictures padded."""
    state = {key: value.contiguous() for key, value in twin.state_dict().items()}
    if name.endswith(".pt"):
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    path = str(tmp_path / name)
    encoder = ClipEncoder(
        mesh, path=path, batch_size=2, dtype="float32", architecture=architecture, pad=True
    )
    check(encoder, twin, pad_and_normalize(images(), 32, OPENAI_MEAN, OPENAI_STD))


def test_hpsv2_is_the_cosine_of_padded_images(twin, mesh, tmp_path, architecture):
    torch.save({"state_dict": twin.state_dict()}, tmp_path / "HPS_v2_compressed.pt")
    path = str(tmp_path / "HPS_v2_compressed.pt")
    scorer = hpsv2.Scorer(mesh, path=path, architecture=architecture, batch_size=2)
    pixels = pad_and_normalize(images(), 32, OPENAI_MEAN, OPENAI_STD)
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
        image = twin.encode_image(pixels, normalize=True)
        text = twin.encode_text(twin.tokenize(TEXTS[: len(image)]), normalize=True)
    made = scorer(images(), TEXTS[: len(image)], [[]] * len(image))["hpsv2"]
    np.testing.assert_allclose(made, torch.diag(image @ text.T).numpy(), atol=1e-5)


def test_a_folder_of_open_clip(twin, mesh, tmp_path):
    config = {"model_cfg": MODEL, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(twin.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = ClipEncoder(mesh, path=str(tmp_path), batch_size=2, dtype="float32")
    check(encoder, twin, resize_and_normalize(images(), **preprocessing(tmp_path)))


def test_transformers_weights_without_tokenizer_and_image_config(mesh, tmp_path):
    """As PickScore's repository has them."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_dict(layouts.open_clip_config(MODEL))
    twin = spread(CLIPModel(config))
    twin.save_pretrained(tmp_path)
    encoder = ClipEncoder(mesh, path=str(tmp_path), batch_size=2, dtype="float32")
    tokens = torch.from_numpy(encoder._tokenize(TEXTS).astype(np.int64))
    with torch.no_grad():
        text = twin.get_text_features(tokens)
    text = getattr(text, "pooler_output", text)
    text = (text / text.norm(dim=-1, keepdim=True)).numpy()
    np.testing.assert_allclose(encoder.texts(TEXTS), text, atol=1e-5)
    assert np.isfinite(encoder.images(images())).all()


def test_errors(mesh, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither config.json nor open_clip_config.json"):
        ClipEncoder(mesh, path=str(tmp_path), batch_size=2, dtype="float32")
    save_file({"logit_scale": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="set the scorer's architecture, such as ViT-H-14"):
        ClipEncoder(mesh, path=str(tmp_path / "a.safetensors"), batch_size=2, dtype="float32")
    with pytest.raises(ValueError, match="not in file   text_model"):
        ClipEncoder(
            mesh,
            path=str(tmp_path / "a.safetensors"),
            batch_size=2,
            dtype="float32",
            architecture="ViT-B-32",
        )
