"""Pictures of the micro world's scenes, uint8 [64, 64, 3]: drawn, drawn badly, made worse."""

import functools
import math

import numpy as np

from agfsync_jax.micro.grammar import BACKGROUNDS, COLORS, Object, Scene
from agfsync_jax.micro.scenes import pick

IMAGE_SIZE = 64
DEGRADATIONS = ("noise", "blur", "washed_out", "mosaic")
_SUBPIXELS = 4  # centers are rounded to a quarter pixel, so that templates can be cached
_SUPERSAMPLING = 6


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points (in units of the radius, y down) lie inside a shape."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.8) & (np.abs(x) <= (y + 1) / 1.8)
    if shape == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= 0.34) & (np.maximum(np.abs(x), np.abs(y)) <= 1)
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.54)
    # Star: fold the plane into half a point, whose edge runs from the tip to the inner corner.
    y = y - 0.1
    sector = 2 * math.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    tip, inner = 1.06, 0.47
    inner_along, inner_across = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    return (along - tip) * inner_across - across * (inner_along - tip) <= 0


def _coverage(
    shape: str, radius: float, sub_x: int = 0, sub_y: int = 0, warp=None, rounding: float = 0.0
) -> np.ndarray:
    """Coverage [n, n, 1] in 0..1 of a shape centered at pixel n // 2 plus a subpixel offset; the
    shape is bent by `warp(x, y)` in units of the radius, then `_rounded`."""
    size = 2 * (math.ceil(radius) + 1) + 1
    steps = (np.arange(size * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - 0.5 - size // 2
    x = ((steps - sub_x / _SUBPIXELS) / radius)[None, :]
    y = ((steps - sub_y / _SUBPIXELS) / radius)[:, None]
    inside = _inside(shape, *(warp(x, y) if warp else (x, y)))
    inside = _rounded(inside, round(rounding * radius * _SUPERSAMPLING))
    blocks = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return blocks.mean((1, 3), dtype=np.float32)[:, :, None]


template = functools.cache(_coverage)  # of an unspoiled shape


def _rounded(inside: np.ndarray, width: int) -> np.ndarray:
    """A mask [h, w] without corners and details: blurred by a box twice, cut at half."""
    if width < 2:
        return inside
    values = inside.astype(np.float32)
    for axis in (0, 1, 0, 1):
        sums = np.cumsum(values, axis)
        ahead = [(width // 2, width - width // 2) if a == axis else (0, 0) for a in (0, 1)]
        sums = np.pad(sums, ahead, mode="edge")
        first = np.take(sums, range(width, sums.shape[axis]), axis)
        values = (first - np.take(sums, range(sums.shape[axis] - width), axis)) / width
    return values >= 0.5


def _wobble(amount: float, rng: np.random.Generator):
    """A smooth random warp of about `amount` radii, which shrinks: what it bends stays in place."""
    direction = rng.uniform(0, 2 * math.pi, (2, 3))
    waves = rng.uniform(2.0, 4.5, (2, 3)) * np.stack([np.cos(direction), np.sin(direction)])
    phases = rng.uniform(0, 2 * math.pi, (2, 3))

    def warp(x, y):
        moved = [
            sum(np.sin(kx * x + ky * y + phase) for kx, ky, phase in zip(*row, strict=True))
            for row in zip(waves[0], waves[1], phases, strict=True)
        ]
        return ((1 + amount) * x + amount * moved[0], (1 + amount) * y + amount * moved[1])

    return warp


def _place(scene: Scene, rng: np.random.Generator) -> list[tuple[Object, float, float, float]]:
    """(object, center x, center y, radius) in pixels; radii in half pixels for the cache."""

    def radius(low: float, high: float) -> float:
        return low + int(rng.random() * (2 * (high - low) + 1)) / 2

    def jitter(amount: float) -> float:
        return (2 * rng.random() - 1) * amount

    middle = (IMAGE_SIZE - 1) / 2
    if scene.kind == "single":
        r = radius(19, 22) if scene.size == "large" else radius(9, 10)
        room = min(8.0, middle - 1.5 - r)
        return [(scene.objects[0], middle + jitter(room), middle + jitter(room), r)]
    if scene.kind == "pair":
        placed = []
        sign = -1 if scene.relation in ("above", "to the left of") else 1
        for thing, side in zip(scene.objects, (sign, -sign), strict=True):
            along, across = middle + side * 17 + jitter(1), middle + jitter(4)
            vertical = scene.relation in ("above", "below")
            x, y = (across, along) if vertical else (along, across)
            placed.append((thing, x, y, radius(11, 13)))
        return placed
    r = radius(10, 12)
    cells = rng.permutation(4)[: scene.count]
    return [
        (scene.objects[0], 15.5 + 32 * (c % 2) + jitter(2), 15.5 + 32 * (c // 2) + jitter(2), r)
        for c in cells.tolist()
    ]


def render(
    scene: Scene, rng: np.random.Generator, bent: dict[Object, tuple[float, float]] | None = None
) -> np.ndarray:
    """Draws a scene: uint8 [64, 64, 3], antialiased, placement and brightness from `rng`.

    `bent` spoils the shapes of some objects: (wobble, rounding), both in radii. A wobble of 0.04 is
    an unsteady hand, 0.15 leaves no shape of the world; a rounding of 0.5 leaves no corner.
    """

    def tint(rgb: tuple[int, int, int]) -> np.ndarray:
        change = int(rng.random() * 17) - 8
        return np.array([min(max(c + change, 0), 255) for c in rgb], np.float32)

    background = tint(BACKGROUNDS[scene.background])
    margin = IMAGE_SIZE // 2  # a square around a shape may reach out of the picture
    canvas = np.empty((2 * IMAGE_SIZE, 2 * IMAGE_SIZE, 3), np.uint8)
    canvas[:] = background
    for thing, x, y, radius in _place(scene, rng):
        quarter_x, quarter_y = round(x * _SUBPIXELS), round(y * _SUBPIXELS)
        exact = thing.shape, radius, quarter_x % _SUBPIXELS, quarter_y % _SUBPIXELS
        if bent and thing in bent:
            wobble, rounding = bent[thing]
            alpha = _coverage(*exact, _wobble(wobble, rng), rounding)
        else:
            alpha = template(*exact)
        size = len(alpha)
        left, top = (q // _SUBPIXELS - size // 2 + margin for q in (quarter_x, quarter_y))
        # Templates never overlap, so blending against the flat background is exact.
        color = tint(COLORS[thing.color])
        canvas[top : top + size, left : left + size] = (
            background + alpha * (color - background) + 0.5
        )
    return canvas[margin:-margin, margin:-margin].copy()


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float [h, w, 3], edges repeated."""
    half = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padding = [(half, half) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, padding, mode="edge")
        length = image.shape[axis]
        image = sum(
            weight * np.take(padded, np.arange(i, i + length), axis)
            for i, weight in enumerate(kernel)
        )
    return image


def degrade(image: np.ndarray, rng: np.random.Generator, kind: str | None = None) -> np.ndarray:
    """A worse looking uint8 copy, by one of DEGRADATIONS (random if None) of random strength."""
    kind = pick(rng, DEGRADATIONS) if kind is None else kind
    pixels = image.astype(np.float32)
    if kind == "noise":
        pixels = pixels + rng.normal(0, rng.uniform(8, 45), pixels.shape)
    elif kind == "blur":
        pixels = _blur(pixels, rng.uniform(0.9, 3))
    elif kind == "washed_out":
        gray = pixels.mean(axis=2, keepdims=True)
        pixels = gray + (pixels - gray) * rng.uniform(0.15, 0.7)
        level = rng.uniform(90, 190)
        pixels = level + (pixels - level) * rng.uniform(0.3, 0.8)
    elif kind == "mosaic":
        factor = int(pick(rng, (2, 4, 8)))
        height, width = image.shape[0] // factor, image.shape[1] // factor
        small = pixels.reshape(height, factor, width, factor, 3).mean((1, 3))
        pixels = small.repeat(factor, 0).repeat(factor, 1)
        if rng.random() < 0.5:
            pixels = _blur(pixels, factor / 2)
    else:
        raise ValueError(
            f"degradation {kind!r} is unknown; expected one of: {', '.join(DEGRADATIONS)}"
        )
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
