"""The micro world's referee: whether a picture shows a scene, by classical vision alone.

It shares nothing with any learned model, and trains none.
"""

import functools
import itertools
import math
import operator
from typing import NamedTuple

import numpy as np

from agfsync_jax.micro.drawing import IMAGE_SIZE, template
from agfsync_jax.micro.grammar import BACKGROUNDS, COLORS, SHAPES, Object, Scene

_MAX_COLOR_DISTANCE = 90.0  # RGB distance beyond which a color has no name
_MIN_CONTRAST = 45.0  # RGB distance from the background that noise does not reach
_MIN_AREA = 8  # smaller specks are ignored
# Least overlap with the best template. Set where a blur of sigma 1.6 pixels still passes, and where
# diamonds, ovals, hearts and rectangles do not: those come nearest to the two compact shapes.
_MIN_SHAPE_IOU = {
    "circle": 0.87,
    "square": 0.85,
    "triangle": 0.78,
    "star": 0.76,
    "cross": 0.8,
    "ring": 0.68,
}
_SIZE_BOUNDARY = 14.5  # radius in pixels between small (9-10) and large (19-22)
_GRID = 24
_RADII = (9.5, 11.0, 12.5, 20.0)  # of the templates


class _Part(NamedTuple):
    """One connected region: its color and shape (None if it has none), place and radius."""

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float


def _nearest_name(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    values = np.array(list(palette.values()), np.float32)
    distances = np.sqrt(((values - rgb) ** 2).sum(1))
    best = int(distances.argmin())
    return list(palette)[best] if distances[best] <= _MAX_COLOR_DISTANCE else None


def _local_max(values: np.ndarray) -> np.ndarray:
    """Maximum over a 7x7 window, zero outside the image."""
    height, width = values.shape
    values = np.pad(values, 3)
    values = np.maximum.reduce([values[i : i + height] for i in range(7)])
    return np.maximum.reduce([values[:, i : i + width] for i in range(7)])


def _cross(values: np.ndarray, outside: int) -> list[np.ndarray]:
    """Of every pixel of [h, w] itself and its four neighbors, each [h, w]."""
    height, width = values.shape
    values = np.pad(values, 1, constant_values=outside)
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    return [values[y : y + height, x : x + width] for y, x in corners]


def label_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """4-connected components of a boolean [h, w]: labels int [h, w] (0 outside) and their number.

    Each pixel takes the least number around it until all pixels of a component have its first's.
    """
    size = mask.size
    least, before = np.where(mask, np.arange(size).reshape(mask.shape), size), None
    while not np.array_equal(least, before):
        before = least
        least = np.where(mask, np.minimum.reduce(_cross(least, size)), size)
        least = np.append(least, size)[least]  # what the pixel of that number has by now
    firsts, labels = np.unique(np.append(least, size), return_inverse=True)
    labels = (labels[:-1].reshape(mask.shape) + 1) * mask
    return labels, len(firsts) - 1


def _moments(coverage: np.ndarray) -> tuple[float, float, float]:
    """Mass and centroid (x, y) of a coverage map [h, w]."""
    columns, rows = coverage.sum(0), coverage.sum(1)
    mass = float(columns.sum())
    x = float(columns @ np.arange(len(columns), dtype=np.float32)) / mass
    y = float(rows @ np.arange(len(rows), dtype=np.float32)) / mass
    return mass, x, y


def _normalized(coverage: np.ndarray) -> np.ndarray:
    """Coverage resampled to [_GRID * _GRID], centered, and scaled to unit area."""
    mass, x, y = _moments(coverage)
    steps = np.linspace(-1, 1, _GRID, dtype=np.float32) * math.sqrt(mass)

    def weights(center: float, length: int) -> np.ndarray:  # bilinear
        offsets = (center + steps)[:, None] - np.arange(length, dtype=np.float32)[None, :]
        return np.maximum(1 - np.abs(offsets), 0)

    resampled = weights(y, coverage.shape[0]) @ coverage @ weights(x, coverage.shape[1]).T
    return resampled.ravel()


@functools.cache
def _shape_templates() -> tuple[np.ndarray, np.ndarray]:
    """Templates [t, _GRID^2], over shapes and then over radii, and area / radius^2 [shapes]."""
    drawn = [[template(shape, radius)[:, :, 0] for radius in _RADII] for shape in SHAPES]
    areas = [coverages[-1].sum() / _RADII[-1] ** 2 for coverages in drawn]
    return np.stack([_normalized(each) for each in itertools.chain(*drawn)]), np.array(areas)


def _read_part(image, background, distance, local, inside: np.ndarray) -> _Part:
    """Reads one region of a crop; `inside` is its mask, the maps are cut to the same crop."""
    core = inside & (distance >= 0.8 * local)
    if not core.any():  # a faint region right beside a strong one
        core = inside
    pixels = image[core]
    rgb = np.median(pixels, axis=0)
    uniform = (((pixels - rgb) ** 2).sum(1) < 70.0**2).mean() >= 0.8
    color = _nearest_name(rgb, COLORS) if uniform else None

    # Antialiased edge: coverage is the share of full contrast, on the region and one pixel around.
    wide = np.logical_or.reduce(_cross(inside, False))
    contrast = max(math.sqrt(((rgb - background) ** 2).sum()), 1.0)
    coverage = np.where(wide, np.minimum(distance / contrast, 1), 0)
    mass, x, y = _moments(coverage)
    templates, areas = _shape_templates()
    grid = _normalized(coverage)
    shared = np.minimum(templates, grid).sum(1)
    ious = shared / (templates.sum(1) + grid.sum() - shared)
    best = int(ious.argmax())
    owner = best // len(_RADII)
    shape = SHAPES[owner]
    radius = math.sqrt(mass / float(areas[owner]))
    return _Part(color, shape if ious[best] >= _MIN_SHAPE_IOU[shape] else None, x, y, radius)


def _read_image(image: np.ndarray) -> tuple[str | None, list[_Part]]:
    """The background's name and every region that is larger than a speck."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)
    distance = np.sqrt(((pixels - background) ** 2).sum(2))
    # An edge lies at half of the contrast nearby, so that soft edges neither grow nor join regions.
    local = _local_max(distance)
    labels, number = label_components(distance > np.maximum(0.5 * local, _MIN_CONTRAST))
    areas = np.bincount(labels.ravel(), minlength=number + 1)
    parts = []
    for label in range(1, number + 1):
        if areas[label] < _MIN_AREA:
            continue
        inside = labels == label
        rows = np.flatnonzero(inside.any(1)).tolist()
        columns = np.flatnonzero(inside.any(0)).tolist()
        crop = np.s_[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]
        part = _read_part(pixels[crop], background, distance[crop], local[crop], inside[crop])
        parts.append(part._replace(x=part.x + crop[1].start, y=part.y + crop[0].start))
    return _nearest_name(background, BACKGROUNDS), parts


def _match(objects: tuple[Object, ...], parts: list[_Part]) -> list[_Part | None]:
    """The region that stands for each object: the assignment that agrees in most attributes."""

    def agreement(thing: Object, part: _Part | None) -> float:
        if part is None:
            return 0.0
        # Color counts a little more: it is the attribute that is read most surely.
        return 1.1 * (part.color == thing.color) + (part.shape == thing.shape)

    candidates = [*sorted(parts, key=lambda part: -part.radius)[:8], *[None] * len(objects)]
    best = max(
        itertools.permutations(candidates, len(objects)),
        key=lambda chosen: sum(map(agreement, objects, chosen)),
    )
    return [
        part if agreement(thing, part) else None for thing, part in zip(objects, best, strict=True)
    ]


def _related(first: _Part | None, second: _Part | None, relation: str) -> bool:
    """Whether the centroids stand in a relation, its axis clearly the dominant one."""
    if first is None or second is None:
        return False
    x, y = first.x - second.x, first.y - second.y
    along, across = (y, x) if relation in ("above", "below") else (x, y)
    sign = -1 if relation in ("above", "to the left of") else 1
    return sign * along > max(10.0, 1.5 * abs(across))


def judge(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Checks a uint8 [64, 64, 3] picture against a scene, by classical vision alone.

    Keys are "element_type" or "element_type:element":
    - "background": the border has the background's color.
    - "counting": exactly `scene.count` regions, any further one beyond a speck of 8 pixels fails.
    - "color:red circle", "shape:red circle": the region that stands for the object has its color,
      its shape; "object:red circle": one region has both. In a count scene every region must.
    - "spatial" (pair): the centroids of the two regions, in the relation.
    - "size" (single): the radius, on the right side of 14.5 pixels.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 image of shape ({IMAGE_SIZE}, {IMAGE_SIZE}, 3), "
            f"got {image.dtype} {image.shape}"
        )
    background, parts = _read_image(image)
    checks = {"background": background == scene.background}
    matched = _match(scene.objects, parts)
    for thing, part in zip(scene.objects, matched, strict=True):
        there = parts if scene.kind == "count" else [part] if part else []
        colors = [each.color == thing.color for each in there]
        shapes = [each.shape == thing.shape for each in there]
        checks[f"object:{thing}"] = any(map(operator.and_, colors, shapes))
        checks[f"color:{thing}"] = bool(there) and all(colors)
        checks[f"shape:{thing}"] = bool(there) and all(shapes)
    if scene.kind == "pair":
        checks["spatial"] = _related(*matched, scene.relation)
    elif scene.kind == "single":
        size = "large" if part and part.radius > _SIZE_BOUNDARY else "small"
        checks["size"] = part is not None and size == scene.size
    checks["counting"] = len(parts) == scene.count
    return checks


def mean(checks: dict[str, bool]) -> float:
    """Share of checks passed."""
    return sum(checks.values()) / len(checks)


def strict(checks: dict[str, bool]) -> bool:
    """Whether every check passed."""
    return all(checks.values())
