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


def encode_pngs(images: UInt8[np.ndarray, "b h w 3"], *, num_threads: int = 8) -> list[bytes]:
    """Encodes a batch in threads (zlib runs outside the interpreter's lock)."""
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(encode_png, images))


def decode_pngs(data: Sequence[bytes], *, num_threads: int = 8) -> UInt8[np.ndarray, "b h w 3"]:
    """Decodes a batch in threads. Raises ValueError when the sizes differ."""
    with ThreadPoolExecutor(num_threads) as pool:
        images = list(pool.map(decode_png, data))
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"Images of one batch differ in size: {sorted({i.shape for i in images})}")
    return np.stack(images) if images else np.zeros((0, 0, 0, 3), np.uint8)


def preprocessing(folder: str | Path) -> dict:
    """Reads a folder's preprocessor_config.json as the arguments of `resize_and_normalize`.

    Returns:
      {"size": (h, w), "mean": (3,), "std": (3,), "crop": bool}, as CLIP's and BLIP's image
      processors use them.

    Raises:
      FileNotFoundError: the folder has no preprocessor_config.json.
      ValueError: a setting that `resize_and_normalize` does not do; all are listed.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says how images are resized.")
    config = json.loads(path.read_text())
    crop = bool(config.get("do_center_crop", False))
    expected = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,  # PIL's BICUBIC
        "rescale_factor": 1 / 255,
    }
    errors = [
        f"{key} is {config[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if config.get(key, value) != value
    ]
    if lacking := sorted({"size", "image_mean", "image_std"} - set(config)):
        raise ValueError(f"{path} lacks {', '.join(lacking)}.")
    size = _size(config["size"])
    if crop:
        crop_size = _size(config.get("crop_size", config["size"]))
        if size != crop_size or size[0] != size[1]:
            errors.append(f"size {size} and crop_size {crop_size} must be one square")
    elif isinstance(config["size"], dict) and "shortest_edge" in config["size"]:
        errors.append("size has a shortest_edge, but do_center_crop is off")
    if errors:
        raise ValueError(f"{path} asks for what is not supported: {'; '.join(errors)}.")
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return {"size": size, "mean": mean, "std": std, "crop": crop}


def _size(size: int | dict) -> tuple[int, int]:
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        return (size.get("height", edge), size.get("width", edge))
    return (size, size)


def resize_and_normalize(
    images: UInt8[Array, "b h w 3"],
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop: bool = True,
) -> Float[Array, "b H W 3"]:
    """Makes a vision tower's input as CLIP's (or, without crop, BLIP's) image processor does.

    Args:
      images: uint8 in 0..255.
      size: height and width of the result.
      mean, std: of the three channels, on the scale 0..1.
      crop: resize the shorter edge and cut out the center; otherwise stretch to `size`.

    Returns:
      float32. Resizing is bicubic with antialiasing and rounds to whole gray levels after each
      axis, as PIL does, to the last bit.

    Raises:
      ValueError: a crop that is not square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    resized = (height, width)
    if crop:
        if height != width:
            raise ValueError(f"A center crop must be square, got {height} x {width}.")
        rows, columns = images.shape[1:3]
        longer = int(height * max(rows, columns) / min(rows, columns))
        resized = (height, longer) if rows <= columns else (longer, width)
    pixels = images.astype(jnp.float32)
    pixels = _resize_axis(pixels, 2, resized[1])
    pixels = _resize_axis(pixels, 1, resized[0])
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    pixels = pixels[:, top : top + height, left : left + width]
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (pixels / 255.0 - mean[None, None, None]) / std[None, None, None]


def _resize_axis(pixels: Float[Array, "b h w c"], axis: int, size: int) -> Float[Array, "b ..."]:
    """Resizes one axis to the very gray levels that PIL gives.

    PIL sums pixels times weights of 22 binary digits. Each weight is split in two halves of 11, so
    that both sums are whole numbers that float32 holds exactly (when shrinking at most 16 times).
    """
    if pixels.shape[axis] == size:
        return pixels
    weights = _bicubic_weights(pixels.shape[axis], size)
    high = np.round(weights / 2**11)
    halves = jnp.asarray(np.stack([high, weights - high * 2**11]), jnp.float32)  # [2, out, in]
    equation = {1: "nih,bhwc->nbiwc", 2: "niw,bhwc->nbhic"}[axis]
    high, low = jnp.einsum(equation, halves, pixels, precision="highest").astype(jnp.int32)
    levels = (high * 2**11 + low + 2**21) >> 22
    return jnp.clip(levels, 0, 255).astype(jnp.float32)


def _bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """PIL's BICUBIC with antialiasing (Keys' kernel, a = -1/2), in units of 2^-22."""
    scale = old / new
    stretch = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old)[None] + 0.5 - centers[:, None]) / stretch
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    return np.trunc(weights * 2**22 + np.copysign(0.5, weights))
