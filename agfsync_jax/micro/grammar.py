"""What can be said in the micro world: its words, a scene, its caption and the scene of a caption.

The world is 64x64 pictures of colored shapes. A `Scene` is one of
- single: "a large red circle on a brown background"
- pair: "a blue square above a red circle on a gray background" (objects differ in color and shape)
- count: "three red crosses on a black background"

Its files, each built on those before: grammar, scenes (which there are), drawing (pictures of
them), questions (about them), referee (whether a picture shows one). All are numpy, and
deterministic given a `np.random.Generator`.
"""

import dataclasses
import re

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
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}
OPPOSITE = {"above": "below", "to the left of": "to the right of"}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}
DIRECTION = dict(zip(RELATIONS, ("above", "below", "left", "right"), strict=True))


def plural(noun: str) -> str:
    """The plural of a shape or of "object"."""
    return noun + ("es" if noun.endswith("s") else "s")


SINGULAR = {plural(shape): shape for shape in SHAPES}


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
    r"|(?P<count>\S+) (?P<colors>\S+) (?P<plural>\S+))"
    r" on a (?P<background>\S+) background"
)


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

    def read(group: str, what: str, allowed) -> str:
        if match[group] not in allowed:
            raise ValueError(
                f"{match[group]!r} is not a {what} of the micro world in caption {caption!r}; "
                f"expected one of: {', '.join(allowed)}"
            )
        return match[group]

    def read_object(number: str = "") -> Object:
        color = read(f"color{number}", "color", COLORS)
        return Object(color, read(f"shape{number}", "shape", SHAPES))

    background = read("background", "background", BACKGROUNDS)
    if match["relation"]:
        first, second = read_object("1"), read_object("2")
        if first.color == second.color or first.shape == second.shape:
            raise ValueError(
                f"the two objects of caption {caption!r} must differ in color and in shape"
            )
        return Scene("pair", (first, second), background, relation=match["relation"], count=2)
    if match["size"]:
        size = read("size", "size", SIZES)
        return Scene("single", (read_object(),), background, size)
    numbers = {NUMBER_WORDS[count]: count for count in COUNTS}
    count = numbers[read("count", "count", numbers)]
    shape = SINGULAR[read("plural", "plural shape", SINGULAR)]
    thing = Object(read("colors", "color", COLORS), shape)
    return Scene("count", (thing,), background, count=count)


def in_reading_order(scene: Scene) -> Scene:
    """The same picture, its upper or left object named first."""
    if scene.relation not in ("below", "to the right of"):
        return scene
    return dataclasses.replace(
        scene, objects=scene.objects[::-1], relation=OPPOSITE[scene.relation]
    )
