"""PNG on the host; resizing and normalizing on the device."""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

# Of the images that CLIP was trained on, on the scale 0..1.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("shortest", "longest", "squash")
CENTERS = ("floor", "round")
_THREADS = 8  # PNG is packed and unpacked outside the interpreter's lock


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes an RGB image losslessly. Raises ValueError for another shape or dtype."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Expected uint8 [h, w, 3], got {image.dtype} {list(image.shape)}.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image to RGB. Raises ValueError when the bytes are not a whole image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG chunk.
        raise ValueError(f"{len(data)} bytes are not a whole image: {error}") from error


def encode_pngs(images: UInt8[np.ndarray, "b h w 3"]) -> list[bytes]:
    """Encodes a batch in threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(encode_png, images))


def decode_pngs(data: Sequence[bytes]) -> UInt8[np.ndarray, "b h w 3"]:
    """Decodes a batch in threads. Raises ValueError for a broken image, and for two sizes."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return stack_images(list(pool.map(decode_png, data)))


def decode_each(data: Sequence[bytes]) -> list[UInt8[np.ndarray, "h w 3"] | ValueError]:
    """Decodes images in threads; a broken one gives its error instead of pixels."""

    def decode(each: bytes) -> np.ndarray | ValueError:
        try:
            return decode_png(each)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(decode, data))


def stack_images(images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "b h w 3"]:
    """A batch of images. Raises ValueError when the sizes differ."""
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"Images of one batch differ in size: {sorted({i.shape for i in images})}")
    return np.stack(images) if len(images) else np.zeros((0, 0, 0, 3), np.uint8)


def preprocessing(folder: str | Path) -> dict:
    """Reads a folder's preprocessor_config.json as the arguments of `resize_and_normalize`.

    Where there is none, open_clip's open_clip_config.json is read.

    Returns:
      {"size": (h, w), "mean": (3,), "std": (3,), "resize_mode": str, "center": str}, as CLIP's and
      BLIP's image processors and open_clip's `image_transform` use them.

    Raises:
      FileNotFoundError: the folder has neither file.
      ValueError: a setting that `resize_and_normalize` does not do; all are listed.
    """
    for name, read in (
        ("preprocessor_config.json", _of_transformers),
        ("open_clip_config.json", _of_open_clip),
    ):
        path = Path(folder) / name
        if path.is_file():
            config, errors = read(json.loads(path.read_text()), path)
            if errors:
                raise ValueError(f"{path} asks for what is not supported: {'; '.join(errors)}.")
            return config
    raise FileNotFoundError(
        f"{folder} has no preprocessor_config.json (nor open_clip_config.json): it says how images"
        " are resized."
    )


def _of_transformers(given: dict, path: Path) -> tuple[dict, list[str]]:
    if lacking := sorted({"size", "image_mean", "image_std"} - set(given)):
        raise ValueError(f"{path} lacks {', '.join(lacking)}.")
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    errors = _unexpected(given, steps | {"resample": 3, "rescale_factor": 1 / 255})  # 3 is bicubic
    crop, size = bool(given.get("do_center_crop", False)), _size(given["size"])
    crop_size = _size(given.get("crop_size", given["size"]))
    if crop and (size != crop_size or size[0] != size[1]):
        errors.append(f"size {size} and crop_size {crop_size} must be one square")
    if not crop and isinstance(given["size"], dict) and "shortest_edge" in given["size"]:
        errors.append("size has a shortest_edge, but do_center_crop is off")
    config = {
        "size": size,
        "mean": tuple(given["image_mean"]),
        "std": tuple(given["image_std"]),
        "resize_mode": "shortest" if crop else "squash",
        "center": "floor",
    }
    return config, errors


def _size(size: int | dict) -> tuple[int, int]:
    if not isinstance(size, dict):
        return size, size
    edge = size.get("shortest_edge")
    return size.get("height", edge), size.get("width", edge)


def _of_open_clip(given: dict, path: Path) -> tuple[dict, list[str]]:
    size = given.get("model_cfg", {}).get("vision_cfg", {}).get("image_size", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    # null means the same as nothing: open_clip's own defaults
    given = {key: value for key, value in given.get("preprocess_cfg", {}).items() if value}
    mode = given.get("resize_mode", "shortest")
    errors = _unexpected(given, {"interpolation": "bicubic", "mode": "RGB", "fill_color": 0})
    if mode not in RESIZE_MODES:
        errors.append(f"resize_mode is {mode!r}, expected one of {', '.join(RESIZE_MODES)}")
    if mode == "shortest" and size[0] != size[1]:
        errors.append(f"size {size} must be a square where resize_mode is shortest")
    config = {
        "size": size,
        "mean": tuple(given.get("mean", OPENAI_MEAN)),
        "std": tuple(given.get("std", OPENAI_STD)),
        "resize_mode": mode,
        "center": "round",
    }
    return config, errors


def _unexpected(given: dict, expected: dict) -> list[str]:
    return [
        f"{key} is {given[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if given.get(key, value) != value
    ]


def resize_and_normalize(
    images: UInt8[Array, "b h w 3"],
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize_mode: str = "shortest",
    center: str = "floor",
) -> Float[Array, "b H W 3"]:
    """Makes a vision tower's input as an image processor that resizes with PIL does.

    Args:
      images: uint8 in 0..255.
      size: height and width of the result.
      mean, std: of the three channels, on the scale 0..1.
      resize_mode: "shortest" resizes the shorter edge and cuts out the center (CLIP), "longest"
        the longer edge and pads with black (some of open_clip's models), "squash" stretches to
        `size` (BLIP).
      center: where an odd number of pixels is cut off, "floor" takes the corner as transformers
        does (rounded down), "round" as torchvision and so open_clip (half to even).

    Returns:
      float32. Resizing is bicubic with antialiasing and rounds to whole gray levels after each
      axis, as PIL does, to the last bit.

    Raises:
      ValueError: an unknown resize_mode or center, or a crop that is not square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if resize_mode not in RESIZE_MODES or center not in CENTERS:
        raise ValueError(
            f"resize_mode is {resize_mode!r} and center {center!r}, expected one of "
            f"{', '.join(RESIZE_MODES)} and one of {', '.join(CENTERS)}."
        )
    if resize_mode == "shortest" and height != width:
        raise ValueError(f"A center crop must be square, got {height} x {width}.")
    rows, columns = images.shape[1:3]
    resized = (height, width)
    if resize_mode == "shortest":
        longer = int(height * max(rows, columns) / min(rows, columns))
        resized = (height, longer) if rows <= columns else (longer, width)
    elif resize_mode == "longest":
        ratio = max(rows / height, columns / width)
        resized = (round(rows / ratio), round(columns / ratio))
    pixels = images.astype(jnp.float32)
    pixels = _resize_levels(pixels, 2, resized[1])
    pixels = _resize_levels(pixels, 1, resized[0])
    whole = round if center == "round" else int
    top, left = whole(max(resized[0] - height, 0) / 2), whole(max(resized[1] - width, 0) / 2)
    pixels = pixels[:, top : top + height, left : left + width]
    return _padded_and_normalized(pixels / 255.0, height, width, mean, std)


def pad_and_normalize(
    images: UInt8[Array, "b h w 3"],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    antialias: bool = True,
) -> Float[Array, "b n n 3"]:
    """Makes a vision tower's input as HPSv2's own code does (Wu et al. 2023).

    The longer edge is resized to `size`, with a cubic kernel on floats: nothing is rounded to gray
    levels or cut to 0..1, so edges overshoot. What is missing is padded with black, the odd pixel
    at the bottom or right, before normalizing.

    Args:
      images, mean, std: as for `resize_and_normalize`.
      size: height and width n of the result.
      antialias: what torchvision does with tensors since 0.17. Before, it did not antialias them,
        and HPSv2's numbers of 2023 were made before.

    Returns:
      float32. An image whose longer edge is `size` already is padded too, where HPSv2's code
      leaves it as it is (and then cannot read it).
    """
    rows, columns = images.shape[1:3]
    scale = size / max(rows, columns)
    pixels = images.astype(jnp.float32) / 255.0
    for axis, new in ((2, round(columns * scale)), (1, round(rows * scale))):
        old = pixels.shape[axis]
        if new != old:
            weights = _bicubic_weights(old, new, antialias=antialias)
            pixels = _apply(weights, pixels, axis)
    return _padded_and_normalized(pixels, size, size, mean, std)


def _padded_and_normalized(
    pixels: Float[Array, "b h w 3"],
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b H W 3"]:
    """Pads with 0 where an axis is too short, the odd pixel at the bottom or right."""
    down, right = height - pixels.shape[1], width - pixels.shape[2]
    padding = ((down // 2, down - down // 2), (right // 2, right - right // 2))
    pixels = jnp.pad(pixels, ((0, 0), *padding, (0, 0)))
    mean, std = (jnp.asarray(each, jnp.float32)[None, None, None] for each in (mean, std))
    return (pixels - mean) / std


def _resize_levels(pixels: Float[Array, "b h w c"], axis: int, size: int) -> Float[Array, "b ..."]:
    """Resizes one axis to the very gray levels that PIL gives.

    PIL sums pixels times weights of 22 binary digits. Each weight is split in two halves of 11, so
    that both sums are whole numbers that float32 holds exactly (when shrinking at most 16 times).
    """
    if pixels.shape[axis] == size:
        return pixels
    weights = _bicubic_weights(pixels.shape[axis], size) * 2**22
    weights = np.trunc(weights + np.copysign(0.5, weights))
    high = np.round(weights / 2**11)
    low = weights - high * 2**11
    high, low = (_apply(half, pixels, axis).astype(jnp.int32) for half in (high, low))
    levels = (high * 2**11 + low + 2**21) >> 22
    return jnp.clip(levels, 0, 255).astype(jnp.float32)


def _apply(
    weights: Float[np.ndarray, "new old"], pixels: Float[Array, "b h w c"], axis: int
) -> Float[Array, "b ..."]:
    equation = {1: "ih,bhwc->biwc", 2: "iw,bhwc->bhic"}[axis]
    return jnp.einsum(equation, jnp.asarray(weights, jnp.float32), pixels, precision="highest")


def _bicubic_weights(old: int, new: int, *, antialias: bool = True) -> Float[np.ndarray, "new old"]:
    """Keys' cubic kernel (1981), in the two forms that PIL and torch have.

    With antialiasing a = -1/2, the kernel is as wide as the pixels shrink, and what it lacks at
    the border is made up by scaling; without, a = -3/4 and the border pixels are repeated.
    """
    scale = old / new
    a, width = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    x = np.abs(np.arange(-2, old + 2)[None] + 0.5 - centers[:, None]) / width
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    before, weights, after = weights[:, :2], weights[:, 2:-2], weights[:, -2:]
    if antialias:
        return weights / weights.sum(1, keepdims=True)
    weights[:, 0] += before.sum(1)
    weights[:, -1] += after.sum(1)
    return weights
