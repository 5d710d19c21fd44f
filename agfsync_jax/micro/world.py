"""The micro world: 64x64 pictures of colored shapes, with captions, questions and a referee.

Everything here is numpy and deterministic given a `np.random.Generator`. A `Scene` is one of
- single: "a large red circle on a brown background"
- pair: "a blue square above a red circle on a gray background" (objects differ in color and shape)
- count: "three red crosses on a black background"

`render` draws it, `questions` is its fixed question set (TIFA's fields), `training_questions` draws
random ones with the same wording, `referee` judges any picture against it by classical vision.
A fifth of all scenes (`is_heldout`) is kept out of all training.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Collection

import numpy as np

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 35, 35),
    "yellow": (245, 215, 30),
    "green": (35, 165, 60),
    "cyan": (40, 205, 220),
    "blue": (40, 70, 225),
    "purple": (165, 50, 200),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "brown": (110, 70, 38),
}
RELATIONS = ("above", "below", "to the left of", "to the right of")
SIZES = ("small", "large")
COUNTS = (2, 3, 4)
KINDS = ("single", "pair", "count")
KIND_SHARES = (0.25, 0.5, 0.25)
SPLITS = ("train", "heldout", "all")
ELEMENT_TYPES = ("object", "color", "shape", "counting", "spatial", "size", "background")
DEGRADATIONS = ("noise", "blur", "washed_out", "mosaic")

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
_NUMBERS = {word: number for number, word in NUMBER_WORDS.items()}
_OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
_DIRECTION = dict(zip(RELATIONS, ("above", "below", "left", "right"), strict=True))
ANSWERS = (
    "yes",
    "no",
    *COLORS,
    *SHAPES,
    *NUMBER_WORDS.values(),
    *_DIRECTION.values(),
    *SIZES,
    *BACKGROUNDS,
)


def plural(noun: str) -> str:
    """The plural of a shape or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


_SINGULAR = {plural(shape): shape for shape in SHAPES}


# --- Scenes and captions ---


@dataclasses.dataclass(frozen=True)
class Object:
    """A color and a shape, such as "red circle"."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says. `objects` holds the distinct ones: two for a pair, else one."""

    kind: str
    objects: tuple[Object, ...]
    background: str
    size: str | None = None
    relation: str | None = None
    count: int = 1

    def caption(self) -> str:
        """The one caption of this scene; `parse_caption` reads it back."""
        first = self.objects[0]
        if self.kind == "single":
            what = f"a {self.size} {first}"
        elif self.kind == "pair":
            what = f"a {first} {self.relation} a {self.objects[1]}"
        else:
            what = f"{NUMBER_WORDS[self.count]} {first.color} {plural(first.shape)}"
        return f"{what} on a {self.background} background"


_CAPTION = re.compile(
    r"(?:a (?P<size>\S+) (?P<color>\S+) (?P<shape>\S+)"
    rf"|a (?P<color1>\S+) (?P<shape1>\S+) (?P<relation>{'|'.join(RELATIONS)})"
    r" a (?P<color2>\S+) (?P<shape2>\S+)"
    r"|(?P<number>\S+) (?P<colors>\S+) (?P<shapes>\S+))"
    r" on a (?P<background>\S+) background"
)


def _choose(word: str, allowed, what: str, caption: str) -> str:
    if word not in allowed:
        raise ValueError(
            f"{word!r} is not a {what} of the micro world in caption {caption!r}; "
            f"expected one of: {', '.join(allowed)}"
        )
    return word


def parse_caption(caption: str) -> Scene:
    """The scene of a caption. ValueError says which word is not in the grammar."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is not in the micro world's grammar; expected for example "
            "'a large red circle on a brown background', "
            "'a blue square above a red circle on a gray background' or "
            "'three red crosses on a black background'"
        )
    words = match.groupdict()
    background = _choose(words["background"], BACKGROUNDS, "background", caption)

    def read_object(color: str, shape: str) -> Object:
        return Object(
            _choose(color, COLORS, "color", caption), _choose(shape, SHAPES, "shape", caption)
        )

    if words["relation"]:
        objects = (
            read_object(words["color1"], words["shape1"]),
            read_object(words["color2"], words["shape2"]),
        )
        if objects[0].color == objects[1].color or objects[0].shape == objects[1].shape:
            raise ValueError(
                f"the two objects of caption {caption!r} must differ in color and in shape"
            )
        return Scene("pair", objects, background, relation=words["relation"], count=2)
    if words["size"]:
        size = _choose(words["size"], SIZES, "size", caption)
        return Scene("single", (read_object(words["color"], words["shape"]),), background, size)
    number_words = [NUMBER_WORDS[count] for count in COUNTS]
    count = _NUMBERS[_choose(words["number"], number_words, "count", caption)]
    shape = _SINGULAR[_choose(words["shapes"], _SINGULAR, "plural shape", caption)]
    return Scene("count", (read_object(words["colors"], shape),), background, count=count)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def in_reading_order(scene: Scene) -> Scene:
    """The same picture, its upper or left object named first."""
    if scene.relation not in ("below", "to the right of"):
        return scene
    return dataclasses.replace(
        scene, objects=scene.objects[::-1], relation=_OPPOSITE[scene.relation]
    )


@functools.cache
def _scene_is_heldout(scene: Scene) -> bool:
    # "A above B" and "B below A" are one picture, so they share a split.
    return _hash(in_reading_order(scene).caption()) % 5 == 0


def is_heldout(caption: str) -> bool:
    """Whether a caption belongs to the fifth that is kept out of all training."""
    return _scene_is_heldout(parse_caption(caption))


def _in_split(scene: Scene, split: str) -> bool:
    return split == "all" or _scene_is_heldout(scene) == (split == "heldout")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of: {', '.join(SPLITS)}")


def _pick(rng: np.random.Generator, values):
    values = tuple(values)
    return values[int(rng.random() * len(values))]


def _others(values, *excluded) -> tuple:
    return tuple(value for value in values if value not in excluded)


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene: a quarter single, half pair, a quarter count."""
    _check_split(split)
    draw = rng.random()
    kind = "single" if draw < 0.25 else "pair" if draw < 0.75 else "count"
    while True:
        first = Object(_pick(rng, COLORS), _pick(rng, SHAPES))
        background = _pick(rng, BACKGROUNDS)
        if kind == "single":
            scene = Scene(kind, (first,), background, size=_pick(rng, SIZES))
        elif kind == "pair":
            second = Object(
                _pick(rng, _others(COLORS, first.color)), _pick(rng, _others(SHAPES, first.shape))
            )
            relation = _pick(rng, RELATIONS)
            scene = Scene(kind, (first, second), background, relation=relation, count=2)
        else:
            scene = Scene(kind, (first,), background, count=_pick(rng, COUNTS))
        if _in_split(scene, split):
            return scene


@functools.cache
def all_scenes(kind: str, split: str = "all") -> tuple[Scene, ...]:
    """Every scene of one kind in a split, in a fixed order."""
    _check_split(split)
    objects = [Object(color, shape) for color in COLORS for shape in SHAPES]
    scenes = []
    for background in BACKGROUNDS:
        if kind == "single":
            scenes += [Scene(kind, (o,), background, size=s) for o in objects for s in SIZES]
        elif kind == "count":
            scenes += [Scene(kind, (o,), background, count=c) for o in objects for c in COUNTS]
        else:
            scenes += [
                Scene(kind, (a, b), background, relation=relation, count=2)
                for a, b in itertools.product(objects, objects)
                if a.color != b.color and a.shape != b.shape
                for relation in RELATIONS
            ]
    return tuple(scene for scene in scenes if _in_split(scene, split))


def sample_scenes(
    rng: np.random.Generator, n: int, split: str = "train", unique: bool = False
) -> list[Scene]:
    """n random scenes; `unique` keeps the mix of kinds while a kind lasts, then tops up."""
    if not unique:
        return [sample_scene(rng, split) for _ in range(n)]
    pools = {kind: list(all_scenes(kind, split)) for kind in KINDS}
    available = sum(len(pool) for pool in pools.values())
    if n > available:
        raise ValueError(f"asked for {n} unique scenes; split {split!r} has only {available}")
    for kind, pool in pools.items():
        pools[kind] = [pool[i] for i in rng.permutation(len(pool))]
    kinds = rng.choice(KINDS, size=n, p=KIND_SHARES)
    scenes = []
    for kind in KINDS:
        wanted = int((kinds == kind).sum())
        scenes += pools[kind][:wanted]
        pools[kind] = pools[kind][wanted:]
    rest = [scene for kind in KINDS for scene in pools[kind]]
    missing = n - len(scenes)
    scenes += [rest[i] for i in rng.permutation(len(rest))[:missing]]
    return [scenes[i] for i in rng.permutation(n)]


def mutate(scene: Scene, rng: np.random.Generator, split: str = "all") -> Scene:
    """A hard negative: the scene with exactly one attribute changed, or two objects exchanged."""
    _check_split(split)
    attributes = {
        "single": ("color", "shape", "size", "background"),
        "pair": ("color", "shape", "relation", "order", "background"),
        "count": ("color", "shape", "count", "background"),
    }[scene.kind]
    while True:
        attribute = _pick(rng, attributes)
        if attribute in ("color", "shape"):
            index = _pick(rng, range(len(scene.objects)))
            used = [getattr(thing, attribute) for thing in scene.objects]
            value = _pick(rng, _others(COLORS if attribute == "color" else SHAPES, *used))
            objects = list(scene.objects)
            objects[index] = dataclasses.replace(objects[index], **{attribute: value})
            mutant = dataclasses.replace(scene, objects=tuple(objects))
        elif attribute == "order":
            mutant = dataclasses.replace(scene, objects=scene.objects[::-1])
        else:
            values = {
                "size": SIZES,
                "relation": RELATIONS,
                "count": COUNTS,
                "background": BACKGROUNDS,
            }[attribute]
            value = _pick(rng, _others(values, getattr(scene, attribute)))
            mutant = dataclasses.replace(scene, **{attribute: value})
        if _in_split(mutant, split):
            return mutant


def misread(scene: Scene, rng: np.random.Generator, split: str = "all") -> Scene:
    """The scene of a careless caption: everything is named, but the two objects or their colors are
    exchanged, one is counted too many or too few, or the size is the other one. In a split in which
    all of these are missing, the scene itself."""
    _check_split(split)
    if scene.kind == "pair":
        (first, second), colors = scene.objects, [thing.color for thing in scene.objects]
        exchanged = Object(colors[1], first.shape), Object(colors[0], second.shape)
        changes = [{"objects": (second, first)}, {"objects": exchanged}]
    elif scene.kind == "single":
        changes = [{"size": size} for size in _others(SIZES, scene.size)]
    else:
        changes = [{"count": count} for count in COUNTS if abs(count - scene.count) == 1]
    told = [dataclasses.replace(scene, **change) for change in changes]
    return _pick(rng, [each for each in told if _in_split(each, split)] or [scene])


# --- Pictures ---

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


@functools.cache
def _template(shape: str, radius: float, sub_x: int = 0, sub_y: int = 0) -> np.ndarray:
    """Coverage [n, n, 1] in 0..1 of a shape centered at pixel n // 2 plus a subpixel offset."""
    return _coverage(shape, radius, sub_x, sub_y, lambda x, y: (x, y))


def _coverage(
    shape: str, radius: float, sub_x: int, sub_y: int, warp, rounding: float = 0.0
) -> np.ndarray:
    """As `_template`, of a shape bent by `warp(x, y)` in units of the radius, then `_rounded`."""
    size = 2 * (math.ceil(radius) + 1) + 1
    steps = (np.arange(size * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - 0.5 - size // 2
    x = (steps - sub_x / _SUBPIXELS) / radius
    y = (steps - sub_y / _SUBPIXELS) / radius
    inside = _inside(shape, *warp(x[None, :], y[:, None]))
    if rounding:
        inside = _rounded(inside, round(rounding * radius * _SUPERSAMPLING))
    blocks = inside.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return blocks.mean((1, 3), dtype=np.float32)[:, :, None]


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
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = background
    for thing, x, y, radius in _place(scene, rng):
        quarter_x, quarter_y = round(x * _SUBPIXELS), round(y * _SUBPIXELS)
        exact = thing.shape, radius, quarter_x % _SUBPIXELS, quarter_y % _SUBPIXELS
        if bent and thing in bent:
            wobble, rounding = bent[thing]
            alpha = _coverage(*exact, _wobble(wobble, rng), rounding)
        else:
            alpha = _template(*exact)
        half = alpha.shape[0] // 2
        left, top = quarter_x // _SUBPIXELS - half, quarter_y // _SUBPIXELS - half
        x0, y0 = max(left, 0), max(top, 0)
        x1, y1 = min(left + 2 * half + 1, IMAGE_SIZE), min(top + 2 * half + 1, IMAGE_SIZE)
        alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
        # Templates never overlap, so blending against the flat background is exact.
        image[y0:y1, x0:x1] = background + alpha * (tint(COLORS[thing.color]) - background) + 0.5
    return image


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
    kind = _pick(rng, DEGRADATIONS) if kind is None else kind
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
        factor = int(_pick(rng, (2, 4, 8)))
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


# --- Questions: one function a template; each returns (question, answer, type, element) ---
_YES_NO = ("yes", "no")


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _ask_object(scene: Scene, thing: Object):
    return f"is there a {thing}?", _yes_no(thing in scene.objects), "object", str(thing)


def _ask_color(scene: Scene, thing: Object):
    verb, noun = ("are", plural(thing.shape)) if scene.kind == "count" else ("is", thing.shape)
    return f"what color {verb} the {noun}?", thing.color, "color", thing.color


def _ask_if_color(scene: Scene, thing: Object, color: str):
    verb, noun = ("are", plural(thing.shape)) if scene.kind == "count" else ("is", thing.shape)
    return f"{verb} the {noun} {color}?", _yes_no(color == thing.color), "color", color


def _ask_shape(scene: Scene, thing: Object):
    verb, noun = ("are", "objects") if scene.kind == "count" else ("is", "object")
    return f"what shape {verb} the {thing.color} {noun}?", thing.shape, "shape", thing.shape


def _ask_if_shape(scene: Scene, thing: Object, shape: str):
    many = scene.kind == "count"
    subject = f"are the {thing.color} objects" if many else f"is the {thing.color} object"
    noun = plural(shape) if many else f"a {shape}"
    return f"{subject} {noun}?", _yes_no(shape == thing.shape), "shape", shape


def _ask_count(scene: Scene, thing: Object | None):
    what = "objects" if thing is None else f"{thing.color} {plural(thing.shape)}"
    number = scene.count if thing is None or scene.kind != "pair" else 1
    return f"how many {what} are there?", NUMBER_WORDS[number], "counting", what


def _ask_if_count(scene: Scene, thing: Object | None, number: int):
    what = "objects" if thing is None else f"{thing.color} {plural(thing.shape)}"
    truth = number == scene.count and (thing is None or scene.objects == (thing,))
    question = f"are there {NUMBER_WORDS[number]} {what}?"
    return question, _yes_no(truth), "counting", what


def _relation_of(scene: Scene, first: Object, second: Object) -> str | None:
    if scene.objects == (first, second):
        return scene.relation
    return _OPPOSITE[scene.relation] if scene.objects == (second, first) else None


def _ask_where(scene: Scene, first: Object, second: Object):
    answer = _DIRECTION[_relation_of(scene, first, second)]
    return f"where is the {first} relative to the {second}?", answer, "spatial", answer


def _ask_place(scene: Scene, first: Object, second: Object):
    answer = _DIRECTION[_relation_of(scene, first, second)]
    return f"where is the {first}?", answer, "spatial", answer


def _ask_if_where(scene: Scene, first: Object, second: Object, relation: str):
    truth = _relation_of(scene, first, second) == relation
    question = f"is the {first} {relation} the {second}?"
    return question, _yes_no(truth), "spatial", _DIRECTION[relation]


def _ask_size(scene: Scene, thing: Object):
    return f"what size is the {thing}?", scene.size, "size", scene.size


def _ask_if_size(scene: Scene, thing: Object, size: str):
    return f"is the {thing} {size}?", _yes_no(size == scene.size), "size", size


def _ask_background(scene: Scene):
    return "what color is the background?", scene.background, "background", scene.background


def _ask_if_background(scene: Scene, background: str):
    truth = _yes_no(background == scene.background)
    return f"is the background {background}?", truth, "background", background


def _near_misses(scene: Scene) -> list[Object]:
    """Objects that are absent but share a color or a shape with one of the scene's."""
    if scene.kind == "pair":  # the colors swapped are the nearest misses
        first, second = scene.objects
        return [Object(first.color, second.shape), Object(second.color, first.shape)]
    thing = scene.objects[0]
    return [Object(thing.color, shape) for shape in _others(SHAPES, thing.shape)] + [
        Object(color, thing.shape) for color in _others(COLORS, thing.color)
    ]


_COMPLETE_CHOICES = {
    "size": SIZES,
    "counting": tuple(NUMBER_WORDS.values()),
    "spatial": tuple(_DIRECTION.values()),
    "background": tuple(BACKGROUNDS),
}


def questions(scene: Scene) -> list[dict]:
    """The fixed question set of a scene (9 to 13 rows), a pure function of its caption.

    Rows have TIFA's keys: question, choices, answer, element_type, element. Color and shape
    questions offer four choices, among them those of the scene's other object.
    """
    caption = scene.caption()

    def stable(values, salt: str) -> list:
        return sorted(values, key=lambda value: _hash(f"{caption}|{salt}|{value}"))

    asked = [_ask_object(scene, thing) for thing in scene.objects]
    asked.append(_ask_object(scene, stable(_near_misses(scene), "object")[0]))
    asked += [_ask_color(scene, thing) for thing in scene.objects]
    asked += [_ask_shape(scene, thing) for thing in scene.objects]
    first = scene.objects[0]
    if scene.kind == "pair":
        second = scene.objects[1]
        asked.append(_ask_if_where(scene, first, second, scene.relation))
        asked.append(_ask_if_where(scene, first, second, _OPPOSITE[scene.relation]))
        asked.append(_ask_where(scene, first, second))
    elif scene.kind == "single":
        asked.append(_ask_if_size(scene, first, stable(SIZES, "size")[0]))
        asked.append(_ask_size(scene, first))
    else:
        near = [n for n in COUNTS if abs(n - scene.count) == 1]
        asked.append(_ask_if_count(scene, first, scene.count))
        asked.append(_ask_if_count(scene, first, stable(near, "count")[0]))
        asked.append(_ask_count(scene, first))
    asked.append(_ask_count(scene, None))
    asked.append(_ask_background(scene))
    wrong = stable(_others(BACKGROUNDS, scene.background), "background")[0]
    asked.append(_ask_if_background(scene, stable((scene.background, wrong), "truth")[0]))

    rows = []
    for question, answer, element_type, element in asked:
        if answer in _YES_NO:
            choices = list(_YES_NO)
        elif element_type in _COMPLETE_CHOICES:
            choices = list(_COMPLETE_CHOICES[element_type])
        else:
            names = COLORS if element_type == "color" else SHAPES
            shown = [getattr(thing, element_type) for thing in scene.objects]
            shown += stable(_others(names, *shown), question)
            choices = stable(shown[:4], "order")
        rows.append(
            {
                "question": question,
                "choices": choices,
                "answer": answer,
                "element_type": element_type,
                "element": element,
            }
        )
    return rows


_TRAINING_WEIGHTS = {
    "single": {"object": 2, "color": 2, "shape": 3, "counting": 2, "size": 2, "background": 1},
    "pair": {"object": 2, "color": 2, "shape": 3, "counting": 1, "spatial": 6, "background": 1},
    "count": {"object": 2, "color": 2, "shape": 3, "counting": 5, "background": 1},
}


def _absent_object(scene: Scene, rng: np.random.Generator) -> Object:
    """An object that is not there: usually right color and wrong shape, or the reverse."""
    thing = _pick(rng, scene.objects)
    draw = rng.random()
    if scene.kind == "pair" and draw < 0.4:
        return _pick(rng, _near_misses(scene))
    while True:
        color = thing.color if draw < 0.65 else _pick(rng, COLORS)
        shape = thing.shape if 0.65 <= draw < 0.9 else _pick(rng, SHAPES)
        if Object(color, shape) not in scene.objects:
            return Object(color, shape)


def _random_question(scene: Scene, rng: np.random.Generator, element_type: str):
    thing = _pick(rng, scene.objects)
    open_question = rng.random() < 0.5
    truth = rng.random() < 0.5
    if element_type == "object":
        return _ask_object(scene, thing if truth else _absent_object(scene, rng))
    if element_type in ("color", "shape"):
        if open_question:
            return (_ask_color if element_type == "color" else _ask_shape)(scene, thing)
        right = getattr(thing, element_type)
        other = getattr(scene.objects[-1 if thing == scene.objects[0] else 0], element_type)
        names = COLORS if element_type == "color" else SHAPES
        wrong = (
            other if other != right and rng.random() < 0.4 else _pick(rng, _others(names, right))
        )
        ask = _ask_if_color if element_type == "color" else _ask_if_shape
        return ask(scene, thing, right if truth else wrong)
    if element_type == "counting":
        if open_question:
            return _ask_count(scene, _pick(rng, (None, thing)))
        if truth:
            return _ask_if_count(scene, thing if scene.kind == "count" else None, scene.count)
        if scene.kind != "count" and rng.random() < 0.5:  # it is there, but only once
            return _ask_if_count(scene, thing, _pick(rng, COUNTS))
        if scene.kind == "count" and rng.random() < 0.25:  # the right number of another thing
            return _ask_if_count(scene, _absent_object(scene, rng), scene.count)
        near = [n for n in COUNTS if abs(n - scene.count) == 1]
        number = _pick(rng, near if rng.random() < 0.75 else _others(COUNTS, scene.count))
        return _ask_if_count(scene, thing if scene.kind == "count" else None, number)
    if element_type == "spatial":
        first, second = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        if rng.random() < 0.3:
            return _ask_place(scene, first, second)
        if open_question:
            return _ask_where(scene, first, second)
        right = _relation_of(scene, first, second)
        if truth:
            return _ask_if_where(scene, first, second, right)
        if rng.random() < 0.2:  # the right relation, but to an object that is not there
            absent = _absent_object(scene, rng)
            objects = (absent, second) if rng.random() < 0.5 else (first, absent)
            if objects[0].color != objects[1].color and objects[0].shape != objects[1].shape:
                return _ask_if_where(scene, *objects, right)
        opposite = rng.random() < 0.6
        wrong = _OPPOSITE[right] if opposite else _pick(rng, _others(RELATIONS, right))
        return _ask_if_where(scene, first, second, wrong)
    if element_type == "size":
        if open_question:
            return _ask_size(scene, thing)
        return _ask_if_size(scene, thing, _pick(rng, SIZES))
    if open_question:
        return _ask_background(scene)
    wrong = _pick(rng, _others(BACKGROUNDS, scene.background))
    return _ask_if_background(scene, scene.background if truth else wrong)


def training_questions(
    scene: Scene, rng: np.random.Generator, n: int, malformed: Collection[Object] = ()
) -> list[tuple[str, str, str]]:
    """n random (question, answer, element_type) in the wording of `questions`.

    Yes and no are balanced, distractors are mostly near misses, and spatial, shape and counting
    are asked more often. Of pairs it is also asked where one object is, without naming the other:
    a step towards the questions that name both. May repeat.

    Objects that are `malformed` (see `render`) have no shape: nothing of their color is a circle,
    and it is not asked what shape they have. Color, number, size and place stay theirs.
    """
    weights = _TRAINING_WEIGHTS[scene.kind]
    types = [kind for kind, weight in weights.items() for _ in range(weight)]
    colors = {thing.color for thing in malformed}
    rows = []
    while len(rows) < n:
        question, answer, element_type, _ = _random_question(scene, rng, _pick(rng, types))
        if element_type in ("object", "shape") and not colors.isdisjoint(question.split()):
            if answer not in _YES_NO:
                continue
            answer = "no"
        rows.append((question, answer, element_type))
    return rows


VOCABULARY = tuple(
    sorted(
        set(ANSWERS)
        | set(_SINGULAR)
        | set(" ".join(RELATIONS).split())
        | set("a on background is there are the what color shape size".split())
        | set("how many where relative to object objects".split())
    )
)


# --- Referee: classical vision, independent of every learned model ---
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)
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


@dataclasses.dataclass(frozen=True)
class _Part:
    """One connected region: its color and shape (None if it has none), place and radius."""

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float


def _nearest_name(rgb: np.ndarray, names, values: np.ndarray) -> str | None:
    distances = np.sqrt(((values - rgb) ** 2).sum(1))
    best = int(distances.argmin())
    return tuple(names)[best] if distances[best] <= _MAX_COLOR_DISTANCE else None


def _local_max(values: np.ndarray) -> np.ndarray:
    """Maximum over a 7x7 window, zero outside the image."""
    height, width = values.shape
    rows = np.zeros((height + 6, width), values.dtype)
    rows[3:-3] = values
    values = np.maximum.reduce([rows[i : i + height] for i in range(7)])
    columns = np.zeros((height, width + 6), values.dtype)
    columns[:, 3:-3] = values
    return np.maximum.reduce([columns[:, i : i + width] for i in range(7)])


def label_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """4-connected components of a boolean [h, w]: labels int [h, w] (0 outside) and their number.

    Union-find over the horizontal runs of the mask.
    """
    height, width = mask.shape
    edges = np.zeros((height, width + 2), np.int8)
    edges[:, 1:-1] = mask
    edges = np.diff(edges, axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True))
    parents = list(range(len(runs)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    above = 0  # first run that may still touch the current one from the row above
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= start):
            above += 1
        j = above
        while runs[j][0] == row - 1 and runs[j][1] < end:
            parents[root(j)] = root(i)
            j += 1
    labels = np.zeros(mask.shape, np.int32)
    numbers: dict[int, int] = {}
    for i, (row, start, end) in enumerate(runs):
        labels[row, start:end] = numbers.setdefault(root(i), len(numbers) + 1)
    return labels, len(numbers)


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
def _shape_templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Templates [t, _GRID^2] over shapes and radii, their shape index, area / radius^2 [shapes]."""
    templates, owners, areas = [], [], []
    for index, shape in enumerate(SHAPES):
        for radius in (9.5, 11.0, 12.5, 20.0):
            coverage = _template(shape, radius)[:, :, 0]
            templates.append(_normalized(coverage))
            owners.append(index)
        areas.append(coverage.sum() / radius**2)
    return np.stack(templates), np.array(owners), np.array(areas)


def _read_part(image, background, distance, local, inside: np.ndarray) -> _Part:
    """Reads one region of a crop; `inside` is its mask, the maps are cut to the same crop."""
    core = inside & (distance >= 0.8 * local)
    if not core.any():  # a faint region right beside a strong one
        core = inside
    pixels = image[core]
    rgb = np.median(pixels, axis=0)
    uniform = (((pixels - rgb) ** 2).sum(1) < 70.0**2).mean() >= 0.8
    color = _nearest_name(rgb, COLORS, _COLOR_VALUES) if uniform else None

    # Antialiased edge: coverage is the share of full contrast, on the region and one pixel around.
    wide = inside.copy()
    wide[1:] |= inside[:-1]
    wide[:-1] |= inside[1:]
    wide[:, 1:] |= inside[:, :-1]
    wide[:, :-1] |= inside[:, 1:]
    contrast = max(math.sqrt(((rgb - background) ** 2).sum()), 1.0)
    coverage = np.where(wide, np.minimum(distance / contrast, 1), 0)
    mass, x, y = _moments(coverage)
    templates, owners, areas = _shape_templates()
    grid = _normalized(coverage)
    shared = np.minimum(templates, grid).sum(1)
    ious = shared / (templates.sum(1) + grid.sum() - shared)
    best = int(ious.argmax())
    shape = SHAPES[owners[best]]
    radius = math.sqrt(mass / float(areas[owners[best]]))
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
        parts.append(dataclasses.replace(part, x=part.x + crop[1].start, y=part.y + crop[0].start))
    return _nearest_name(background, BACKGROUNDS, _BACKGROUND_VALUES), parts


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


def referee(image: np.ndarray, scene: Scene) -> dict[str, bool]:
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
    if scene.kind == "count":
        thing = scene.objects[0]
        checks[f"object:{thing}"] = any(
            part.color == thing.color and part.shape == thing.shape for part in parts
        )
        checks[f"color:{thing}"] = bool(parts) and all(p.color == thing.color for p in parts)
        checks[f"shape:{thing}"] = bool(parts) and all(p.shape == thing.shape for p in parts)
    else:
        matched = _match(scene.objects, parts)
        for thing, part in zip(scene.objects, matched, strict=True):
            color = part is not None and part.color == thing.color
            shape = part is not None and part.shape == thing.shape
            checks[f"object:{thing}"] = color and shape
            checks[f"color:{thing}"] = color
            checks[f"shape:{thing}"] = shape
        if scene.kind == "pair":
            checks["spatial"] = _related(*matched, scene.relation)
        else:
            part = matched[0]
            large = part is not None and part.radius > _SIZE_BOUNDARY
            checks["size"] = part is not None and large == (scene.size == "large")
    checks["counting"] = len(parts) == scene.count
    return checks


def referee_mean(checks: dict[str, bool]) -> float:
    """Share of checks passed."""
    return sum(checks.values()) / len(checks)


def referee_strict(checks: dict[str, bool]) -> bool:
    """Whether every check passed."""
    return all(checks.values())
