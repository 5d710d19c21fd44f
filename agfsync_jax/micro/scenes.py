"""The scenes that there are, all of them or drawn at random, and those that are nearly the same.

A fifth of all scenes (`is_heldout`) is kept out of all training: half of it, the split
"validation", is there to choose settings by, the other half, "test", to judge what was chosen.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from agfsync_jax.micro.grammar import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    in_reading_order,
)

SPLITS = ("train", "heldout", "validation", "test", "all")
_KIND_SHARES = (0.25, 0.5, 0.25)
# Kind -> what `mutate` changes, and its values.
_LOOKS = {"color": tuple(COLORS), "shape": SHAPES}
_BACKGROUND = {"background": tuple(BACKGROUNDS)}
_CHANGES = {
    "single": _LOOKS | {"size": SIZES} | _BACKGROUND,
    "pair": _LOOKS | {"relation": RELATIONS, "order": ()} | _BACKGROUND,
    "count": _LOOKS | {"count": COUNTS} | _BACKGROUND,
}


def stable_hash(text: str) -> int:
    """The same number in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@functools.cache
def _tenth(scene: Scene) -> int:
    """0 to 9. "A above B" and "B below A" are one picture: they are in one split."""
    return stable_hash(in_reading_order(scene).caption()) % 10


def is_heldout(scene: Scene) -> bool:
    """Whether a scene belongs to the fifth that is kept out of all training."""
    return _tenth(scene) % 5 == 0


def _in_split(scene: Scene, split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of: {', '.join(SPLITS)}")
    if split in ("validation", "test"):
        return _tenth(scene) == (0 if split == "validation" else 5)
    return split == "all" or is_heldout(scene) == (split == "heldout")


def pick(rng: np.random.Generator, values):
    """One of the values, all alike likely."""
    values = tuple(values)
    return values[int(rng.random() * len(values))]


def others(values, *excluded) -> tuple:
    """The values but for some, in order."""
    return tuple(value for value in values if value not in excluded)


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """A random scene: a quarter single, half pair, a quarter count."""
    draw = rng.random()
    kind = "single" if draw < 0.25 else "pair" if draw < 0.75 else "count"
    while True:
        first = Object(pick(rng, COLORS), pick(rng, SHAPES))
        background = pick(rng, BACKGROUNDS)
        if kind == "single":
            scene = Scene(kind, (first,), background, size=pick(rng, SIZES))
        elif kind == "pair":
            second = Object(
                pick(rng, others(COLORS, first.color)), pick(rng, others(SHAPES, first.shape))
            )
            relation = pick(rng, RELATIONS)
            scene = Scene(kind, (first, second), background, relation=relation, count=2)
        else:
            scene = Scene(kind, (first,), background, count=pick(rng, COUNTS))
        if _in_split(scene, split):
            return scene


@functools.cache
def all_scenes(kind: str, split: str = "all") -> tuple[Scene, ...]:
    """Every scene of one kind in a split, in a fixed order."""
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
    pools = {kind: [pool[i] for i in rng.permutation(len(pool))] for kind, pool in pools.items()}
    kinds = rng.choice(KINDS, size=n, p=_KIND_SHARES)
    wanted = {kind: int((kinds == kind).sum()) for kind in KINDS}
    scenes = [scene for kind in KINDS for scene in pools[kind][: wanted[kind]]]
    rest = [scene for kind in KINDS for scene in pools[kind][wanted[kind] :]]
    scenes += [rest[i] for i in rng.permutation(len(rest))[: n - len(scenes)]]
    return [scenes[i] for i in rng.permutation(n)]


def mutate(scene: Scene, rng: np.random.Generator, split: str = "all") -> Scene:
    """A hard negative: the scene with exactly one attribute changed, or two objects exchanged."""
    while True:
        attribute, values = pick(rng, _CHANGES[scene.kind].items())
        if attribute == "order":
            mutant = dataclasses.replace(scene, objects=scene.objects[::-1])
        elif attribute in _LOOKS:
            index = pick(rng, range(len(scene.objects)))
            used = [getattr(thing, attribute) for thing in scene.objects]
            objects = list(scene.objects)
            value = pick(rng, others(values, *used))
            objects[index] = dataclasses.replace(objects[index], **{attribute: value})
            mutant = dataclasses.replace(scene, objects=tuple(objects))
        else:
            value = pick(rng, others(values, getattr(scene, attribute)))
            mutant = dataclasses.replace(scene, **{attribute: value})
        if _in_split(mutant, split):
            return mutant


def misread(scene: Scene, rng: np.random.Generator, split: str = "all") -> Scene:
    """The scene of a careless caption: everything is named, but the two objects or their colors are
    exchanged, one is counted too many or too few, or the size is the other one. In a split in which
    all of these are missing, the scene itself."""
    if scene.kind == "pair":
        (first, second), colors = scene.objects, [thing.color for thing in scene.objects]
        exchanged = Object(colors[1], first.shape), Object(colors[0], second.shape)
        changes = [{"objects": (second, first)}, {"objects": exchanged}]
    elif scene.kind == "single":
        changes = [{"size": size} for size in others(SIZES, scene.size)]
    else:
        changes = [{"count": count} for count in COUNTS if abs(count - scene.count) == 1]
    told = [dataclasses.replace(scene, **change) for change in changes]
    return pick(rng, [each for each in told if _in_split(each, split)] or [scene])
