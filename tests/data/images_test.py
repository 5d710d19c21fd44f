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
    from transformers import CLIPImageProcessorPil

    batch = pictures(3, h, w)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
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
    ours = images.resize_and_normalize(batch, size, (0, 0, 0), (1, 1, 1), resize_mode="squash")
    np.testing.assert_array_equal(np.round(np.asarray(ours) * 255), wanted)


def test_crop_must_be_square():
    with pytest.raises(ValueError, match="square, got 32 x 64"):
        images.resize_and_normalize(pictures(1, 64, 64), (32, 64), MEAN, STD)


@pytest.mark.parametrize("h, w", [(40, 30), (30, 40), (48, 64), (10, 5)])
def test_longest_pads_to_any_shape(h, w):
    """As open_clip: the odd pixel of padding at the bottom or right."""
    batch = pictures(2, h, w)
    height, width = 24, 41
    ratio = max(h / height, w / width)
    small = (round(w / ratio), round(h / ratio))
    top, left = (height - small[1]) // 2, (width - small[0]) // 2
    wanted = np.zeros((2, height, width, 3), np.uint8)
    for row, image in zip(wanted, batch, strict=True):
        resized = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
        row[top : top + small[1], left : left + small[0]] = resized
    ours = images.resize_and_normalize(
        batch, (height, width), (0, 0, 0), (1, 1, 1), resize_mode="longest"
    )
    np.testing.assert_array_equal(np.round(np.asarray(ours) * 255), wanted)


def test_pad_at_its_own_size():
    """Nothing is resized; black is 0 before normalizing; floats are not cut to 0..1."""
    batch = pictures(2, 20, 31)
    padded = np.pad(batch, ((0, 0), (5, 6), (0, 0), (0, 0)))
    wanted = (padded / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(images.pad_and_normalize(batch, 31, MEAN, STD), wanted, atol=1e-5)
    edge = np.zeros((1, 20, 20, 3), np.uint8)
    edge[:, :, 10:] = 255
    for antialias in (True, False):
        ours = images.pad_and_normalize(edge, 31, (0,) * 3, (1,) * 3, antialias=antialias)
        assert ours.min() < -0.05 and ours.max() > 1.05


def test_unknown_modes():
    for name in ("resize_mode", "center"):
        with pytest.raises(ValueError, match=f"{name} .*'other'.*expected one of shortest, long"):
            images.resize_and_normalize(pictures(1, 8, 8), 8, MEAN, STD, **{name: "other"})


def test_preprocessing_reads_what_processors_write(tmp_path):
    from transformers import BlipImageProcessorPil, CLIPImageProcessorPil

    CLIPImageProcessorPil().save_pretrained(tmp_path)
    clip = {"size": (224, 224), "mean": MEAN, "std": STD}
    clip |= {"resize_mode": "shortest", "center": "floor"}
    assert images.preprocessing(tmp_path) == clip
    (tmp_path / "open_clip_config.json").write_text("{}")  # the other file goes first
    assert images.preprocessing(tmp_path) == clip
    BlipImageProcessorPil(size={"height": 64, "width": 48}).save_pretrained(tmp_path)
    blip = {"size": (64, 48), "mean": MEAN, "std": STD}
    blip |= {"resize_mode": "squash", "center": "floor"}
    assert images.preprocessing(tmp_path) == blip


def test_preprocessing_reads_what_open_clip_writes(tmp_path):
    def read(config):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return images.preprocessing(tmp_path)

    defaults = {"mean": MEAN, "std": STD, "resize_mode": "shortest", "center": "round"}
    model = {"vision_cfg": {"image_size": 336}}
    assert read({"model_cfg": model}) == defaults | {"size": (336, 336)}
    given = {"interpolation": "bicubic", "resize_mode": None, "size": [3, 336, 336]}
    assert read({"model_cfg": model, "preprocess_cfg": given}) == defaults | {"size": (336, 336)}
    given = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash", "fill_color": 0}
    model = {"vision_cfg": {"image_size": [64, 48]}}
    assert read({"model_cfg": model, "preprocess_cfg": given}) == {
        "size": (64, 48),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "resize_mode": "squash",
        "center": "round",
    }
    given = {"interpolation": "bilinear", "fill_color": 1, "resize_mode": "tallest"}
    wanted = "'bilinear', expected 'bicubic'; fill_color is 1.*'tallest', expected one of shortest"
    with pytest.raises(ValueError, match=wanted):
        read({"model_cfg": model, "preprocess_cfg": given})
    with pytest.raises(ValueError, match=r"\(64, 48\) must be a square"):
        read({"model_cfg": model})


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
