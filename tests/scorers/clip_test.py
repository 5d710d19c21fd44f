"""CLIP score and aesthetic score equal transformers' CLIPModel on a tiny random twin."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import aesthetic, clip, pickscore
from tests.twins import clip_tokenizer_files

SIZE = 16  # of the vision tower
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("twin") / "clip"
    vocab_size = len(clip_tokenizer_files(folder, ["cat", "red"]))
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPConfig(
        text_config=tower
        | {
            "hidden_size": 16,
            "vocab_size": vocab_size,
            "max_position_embeddings": 12,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        vision_config=tower | {"hidden_size": 20, "image_size": SIZE, "patch_size": 4},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # far from the initial values, so that scores differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_resize": True,
                "size": {"shortest_edge": SIZE},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": SIZE, "width": SIZE},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": MEAN,
                "image_std": STD,
            }
        )
    )
    return folder, model


@pytest.fixture(scope="module")
def mesh():
    return create_mesh({"data": -1})


def draw(number, size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3)).astype(np.uint8)


def twin_embeddings(twin, images, prompts):
    from transformers import CLIPTokenizer

    folder, model = twin
    pixels = (images / 255 - np.array(MEAN)) / np.array(STD)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            input_ids=tokens["input_ids"],
            attention_mask=None,
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        )
    return out.image_embeds.numpy(), out.text_embeds.numpy(), out.logits_per_image.numpy()


PROMPTS = ["a red cat", "a dog", "a red cat", "three blue cats that do not fit the text"]


def test_equals_transformers(twin, mesh):
    images, prompts = draw(11), [PROMPTS[n % 4] for n in range(11)]
    folder, model = twin
    scorer = clip.Scorer(mesh, path=str(folder), batch_size=8)
    actual = scorer(images, prompts, [[]] * 11)["clip"]
    image, text, logits = twin_embeddings(twin, images, prompts)
    np.testing.assert_allclose(actual, 100 * (image * text).sum(-1), atol=1e-4)
    scale = model.logit_scale.exp().item()
    np.testing.assert_allclose(actual * scale / 100, np.diag(logits), atol=1e-4)
    assert actual.std() > 1


def test_pickscore_is_the_scaled_logit(twin, mesh):
    images, prompts = draw(5), [PROMPTS[n % 4] for n in range(5)]
    actual = pickscore.Scorer(mesh, path=str(twin[0]), batch_size=8)(images, prompts, [[]] * 5)
    _, _, logits = twin_embeddings(twin, images, prompts)
    np.testing.assert_allclose(actual["pickscore"], np.diag(logits), atol=1e-4)
    assert actual["pickscore"].dtype == np.float32


def test_scorers_of_one_clip_share_its_tower(twin, mesh, tmp_path, monkeypatch):
    write_head(tmp_path / "head.safetensors", 12)
    path = str(twin[0])
    both = {
        "clip": clip.Scorer(mesh, path=path, batch_size=8),
        "aesthetic": aesthetic.Scorer(
            mesh, path=path, head=str(tmp_path / "head.safetensors"), batch_size=8
        ),
    }
    encoder = both["clip"]._encoder
    assert both["aesthetic"]._encoder is encoder
    assert clip.Scorer(mesh, path=path, batch_size=16)._encoder is not encoder
    run, calls = encoder._embed_images, []
    monkeypatch.setattr(
        encoder, "_embed_images", lambda params, x: calls.append(len(x)) or run(params, x)
    )
    images = draw(8)
    for scorer in (*both.values(), *both.values()):
        scorer(images, ["a cat"] * 8, [[]] * 8)
    assert calls == [8]
    both["clip"](images.copy(), ["a cat"] * 8, [[]] * 8)
    assert calls == [8, 8]


def test_preprocessing_is_that_of_the_image_processor(twin, mesh):
    from transformers import CLIPImageProcessor

    folder, model = twin
    images = np.random.default_rng(1).integers(0, 256, (3, 40, 56, 3)).astype(np.uint8)
    pixels = CLIPImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**pixels).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    actual = clip.ClipEncoder(mesh, path=str(folder), batch_size=8, dtype="float32").images(images)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_each_prompt_is_encoded_once(twin, mesh, monkeypatch):
    encoder = clip.ClipEncoder(mesh, path=str(twin[0]), batch_size=8, dtype="float32")
    seen = []
    tokenize = encoder._tokenize
    monkeypatch.setattr(encoder, "_tokenize", lambda texts: seen.extend(texts) or tokenize(texts))
    first = encoder.texts(["a", "b", "a"])
    second = encoder.texts(["b", "c"])
    assert seen == ["a", "b", "c"]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[1], second[0])


def test_batch_size_and_devices_change_nothing(twin, mesh):
    images, prompts = draw(5), ["a cat"] * 5
    one = create_mesh({"data": 1}, devices=jax.devices()[:1])
    scores = [
        clip.Scorer(on, path=str(twin[0]), batch_size=size)(images, prompts, [[]] * 5)["clip"]
        for on, size in ((mesh, 3), (one, 2), (one, 64))
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-4)


def write_head(path, size):
    torch.manual_seed(1)
    sizes = [(0, size, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)]
    layers = {number: torch.nn.Linear(a, b) for number, a, b in sizes}
    save_file(
        {f"layers.{n}.{k}": v for n, x in layers.items() for k, v in x.state_dict().items()}, path
    )
    return torch.nn.Sequential(*layers.values())


def test_aesthetic_equals_torch(twin, mesh, tmp_path):
    images = draw(9)
    head = write_head(tmp_path / "head.safetensors", 12)
    scorer = aesthetic.Scorer(
        mesh, path=str(twin[0]), head=str(tmp_path / "head.safetensors"), batch_size=8
    )
    actual = scorer(images, ["a"] * 9, [[]] * 9)["aesthetic"]
    embeddings, _, _ = twin_embeddings(twin, images, ["a"])
    with torch.no_grad():
        expected = head(torch.from_numpy(embeddings)).numpy()[:, 0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_a_head_for_another_clip(twin, mesh, tmp_path):
    write_head(tmp_path / "head.safetensors", 768)
    with pytest.raises(ValueError, match=r"takes embeddings of 768 numbers.* makes 12"):
        aesthetic.Scorer(mesh, path=str(twin[0]), head=str(tmp_path / "head.safetensors"))
    (tmp_path / "head.pth").write_bytes(b"pickle" * 9)
    with pytest.raises(ValueError, match="not a whole pickle of tensors alone"):
        aesthetic.load_head(str(tmp_path / "head.pth"))
