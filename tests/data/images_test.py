import json

import jax
import numpy as np
import pytest
from PIL import Image

from agfsync_jax.data import images

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pictures(b, h, w, seed=0):
    """Smooth shapes with noise: edges, flats and texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w]
    rows = []
    for _ in range(b):
        disk = (y - h * rng.uniform()) ** 2 + (x - w * rng.uniform()) ** 2 < (h / 4) ** 2
        base = np.where(disk[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3))
        rows.append(np.clip(base + rng.normal(0, 20, (h, w, 3)), 0, 255))
    return np.stack(rows).astype(np.uint8)


def test_png_there_and_back():
    batch = pictures(5, 24, 32)
    encoded = images.encode_pngs(batch)
    assert encoded == [images.encode_png(image) for image in batch]
    np.testing.assert_array_equal(images.decode_pngs(encoded), batch)
    assert images.decode_pngs([]).shape == (0, 0, 0, 3)


def test_png_errors():
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], got float32 \[4, 4, 3\]"):
        images.encode_png(np.zeros((4, 4, 3), np.float32))
    data = images.encode_png(pictures(1, 24, 32)[0])
    for broken in (data[: len(data) // 2], b"", b"no image"):
        with pytest.raises(ValueError, match=f"{len(broken)} bytes are not a whole image"):
            images.decode_png(broken)
    other = images.encode_png(pictures(1, 8, 8)[0])
    with pytest.raises(ValueError, match="differ in size"):
        images.decode_pngs([data, other])


@pytest.mark.parametrize("h, w, size", [(64, 64, 224), (300, 260, 224), (64, 96, 32), (96, 64, 48)])
def test_crop_equals_clips_image_processor(h, w, size):
    from transformers import CLIPImageProcessor

    batch = pictures(3, h, w)
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    wanted = processor([Image.fromarray(i) for i in batch], return_tensors="np")["pixel_values"]
    resize = jax.jit(lambda x: images.resize_and_normalize(x, size, MEAN, STD))
    ours = np.asarray(resize(batch)).transpose(0, 3, 1, 2)
    assert ours.shape == wanted.shape == (3, 3, size, size)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)  # one gray level is 0.015


@pytest.mark.parametrize(
    "h, w, size", [(64, 64, 64), (64, 96, 48), (40, 30, (56, 64)), (512, 520, 224)]
)
def test_stretch_equals_pil(h, w, size):
    batch = pictures(2, h, w)
    height, width = (size, size) if isinstance(size, int) else size
    wanted = np.stack(
        [Image.fromarray(i).resize((width, height), Image.Resampling.BICUBIC) for i in batch]
    )
    ours = images.resize_and_normalize(batch, size, (0, 0, 0), (1, 1, 1), crop=False)
    np.testing.assert_array_equal(np.round(np.asarray(ours) * 255), wanted)


def test_crop_must_be_square():
    with pytest.raises(ValueError, match="square, got 32 x 64"):
        images.resize_and_normalize(pictures(1, 64, 64), (32, 64), MEAN, STD)


def test_preprocessing_reads_what_processors_write(tmp_path):
    from transformers import BlipImageProcessor, CLIPImageProcessor

    CLIPImageProcessor().save_pretrained(tmp_path)
    assert images.preprocessing(tmp_path) == {
        "size": (224, 224),
        "mean": MEAN,
        "std": STD,
        "crop": True,
    }
    BlipImageProcessor(size={"height": 64, "width": 48}).save_pretrained(tmp_path)
    clip = images.preprocessing(tmp_path)
    assert clip == {"size": (64, 48), "mean": MEAN, "std": STD, "crop": False}


def test_preprocessing_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        images.preprocessing(tmp_path)
    config = {"size": 32, "image_mean": MEAN, "image_std": STD, "resample": 2, "do_resize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do_resize is False.*resample is 2, expected 3"):
        images.preprocessing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks image_mean, image_std, size"):
        images.preprocessing(tmp_path)
