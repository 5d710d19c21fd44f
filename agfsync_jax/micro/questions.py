"""Questions about the micro world's scenes: a fixed set for each, and random ones to train on."""

import itertools
from collections.abc import Collection

import numpy as np

from agfsync_jax.micro.grammar import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    DIRECTION,
    NUMBER_WORDS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SINGULAR,
    SIZES,
    Object,
    Scene,
    plural,
)
from agfsync_jax.micro.scenes import others, pick, stable_hash

_YES_NO = ("yes", "no")
# Element type -> all answers to its open questions.
_VALUES = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "counting": tuple(NUMBER_WORDS.values()),
    "spatial": tuple(DIRECTION.values()),
    "size": SIZES,
    "background": tuple(BACKGROUNDS),
}
ELEMENT_TYPES = ("object", *_VALUES)
ANSWERS = (*_YES_NO, *itertools.chain(*_VALUES.values()))
_OTHER_WORDS = (
    "a on background is there are the what color shape size how many where relative to object"
    " objects"
)
VOCABULARY = tuple(
    sorted({*ANSWERS, *SINGULAR, *" ".join(RELATIONS).split(), *_OTHER_WORDS.split()})
)


# Each asks in one wording, or in two: openly, and with a value whether it is that. They return
# (question, answer, element type, element).


def _ask_object(scene: Scene, thing: Object):
    return f"is there a {thing}?", _yes_no(thing in scene.objects), "object", str(thing)


def _ask_look(scene: Scene, kind: str, thing: Object, value: str | None = None):
    noun, right = {
        "color": (thing.shape, thing.color),
        "shape": (f"{thing.color} object", thing.shape),
        "size": (str(thing), scene.size),
        "background": ("background", scene.background),
    }[kind]
    many = scene.kind == "count" and kind != "background"
    subject = f"are the {plural(noun)}" if many else f"is the {noun}"
    if value is None:
        return f"what {'color' if kind == 'background' else kind} {subject}?", right, kind, right
    said = value if kind != "shape" else plural(value) if many else f"a {value}"
    return f"{subject} {said}?", _yes_no(value == right), kind, value


def _ask_count(scene: Scene, thing: Object | None, number: int | None = None):
    what = "objects" if thing is None else f"{thing.color} {plural(thing.shape)}"
    if number is None:
        there = scene.count if thing is None or scene.kind != "pair" else 1
        return f"how many {what} are there?", NUMBER_WORDS[there], "counting", what
    truth = number == scene.count and (thing is None or scene.objects == (thing,))
    return f"are there {NUMBER_WORDS[number]} {what}?", _yes_no(truth), "counting", what


def _ask_where(scene: Scene, first: Object, second: Object, relation: str | None = None):
    right = _relation_of(scene, first, second)
    if relation is None:
        place = DIRECTION[right]
        return f"where is the {first} relative to the {second}?", place, "spatial", place
    question = f"is the {first} {relation} the {second}?"
    return question, _yes_no(relation == right), "spatial", DIRECTION[relation]


def _relation_of(scene: Scene, first: Object, second: Object) -> str | None:
    if scene.objects == (first, second):
        return scene.relation
    return OPPOSITE[scene.relation] if scene.objects == (second, first) else None


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _near_misses(scene: Scene) -> list[Object]:
    """Objects that are absent but share a color or a shape with one of the scene's."""
    if scene.kind == "pair":  # the colors swapped are the nearest misses
        first, second = scene.objects
        return [Object(first.color, second.shape), Object(second.color, first.shape)]
    thing = scene.objects[0]
    return [Object(thing.color, shape) for shape in others(SHAPES, thing.shape)] + [
        Object(color, thing.shape) for color in others(COLORS, thing.color)
    ]


def _near_counts(scene: Scene) -> list[int]:
    return [number for number in COUNTS if abs(number - scene.count) == 1]


def fixed_questions(scene: Scene) -> list[dict]:
    """The fixed question set of a scene (9 to 13 rows), a pure function of its caption.

    Rows have TIFA's keys: question, choices, answer, element_type, element. Color and shape
    questions offer four choices, among them those of the scene's other object.
    """
    caption = scene.caption()

    def stable(values, salt: str) -> list:
        return sorted(values, key=lambda value: stable_hash(f"{caption}|{salt}|{value}"))

    asked = [_ask_object(scene, thing) for thing in scene.objects]
    asked.append(_ask_object(scene, stable(_near_misses(scene), "object")[0]))
    asked += [_ask_look(scene, kind, o) for kind in ("color", "shape") for o in scene.objects]
    first = scene.objects[0]
    if scene.kind == "pair":
        relations = (scene.relation, OPPOSITE[scene.relation], None)
        asked += [_ask_where(scene, *scene.objects, relation) for relation in relations]
    elif scene.kind == "single":
        sizes = (stable(SIZES, "size")[0], None)
        asked += [_ask_look(scene, "size", first, size) for size in sizes]
    else:
        near = stable(_near_counts(scene), "count")[0]
        asked += [_ask_count(scene, first, number) for number in (scene.count, near, None)]
    asked.append(_ask_count(scene, None))
    wrong = stable(others(BACKGROUNDS, scene.background), "background")[0]
    background = stable((scene.background, wrong), "truth")[0]
    asked += [_ask_look(scene, "background", first, value) for value in (None, background)]

    rows = []
    for question, answer, element_type, element in asked:
        choices = _YES_NO if answer in _YES_NO else _VALUES[element_type]
        if answer not in _YES_NO and element_type in ("color", "shape"):
            shown = [getattr(thing, element_type) for thing in scene.objects]
            shown += stable(others(choices, *shown), question)
            choices = stable(shown[:4], "order")
        rows.append(
            {
                "question": question,
                "choices": list(choices),
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
    thing = pick(rng, scene.objects)
    draw = rng.random()
    if scene.kind == "pair" and draw < 0.4:
        return pick(rng, _near_misses(scene))
    while True:
        color = thing.color if draw < 0.65 else pick(rng, COLORS)
        shape = thing.shape if 0.65 <= draw < 0.9 else pick(rng, SHAPES)
        if Object(color, shape) not in scene.objects:
            return Object(color, shape)


def _random_question(scene: Scene, rng: np.random.Generator, element_type: str):
    thing = pick(rng, scene.objects)
    open_question = rng.random() < 0.5
    truth = rng.random() < 0.5
    if element_type == "object":
        return _ask_object(scene, thing if truth else _absent_object(scene, rng))
    if element_type == "counting":
        if open_question:
            return _ask_count(scene, pick(rng, (None, thing)))
        named = thing if scene.kind == "count" else None
        if truth:
            return _ask_count(scene, named, scene.count)
        if scene.kind != "count" and rng.random() < 0.5:  # it is there, but only once
            return _ask_count(scene, thing, pick(rng, COUNTS))
        if scene.kind == "count" and rng.random() < 0.25:  # the right number of another thing
            return _ask_count(scene, _absent_object(scene, rng), scene.count)
        near = rng.random() < 0.75
        numbers = _near_counts(scene) if near else others(COUNTS, scene.count)
        return _ask_count(scene, named, pick(rng, numbers))
    if element_type == "spatial":
        first, second = scene.objects if rng.random() < 0.5 else scene.objects[::-1]
        if rng.random() < 0.3:
            return f"where is the {first}?", *_ask_where(scene, first, second)[1:]
        if open_question:
            return _ask_where(scene, first, second)
        right = _relation_of(scene, first, second)
        if truth:
            return _ask_where(scene, first, second, right)
        if rng.random() < 0.2:  # the right relation, but to an object that is not there
            absent = _absent_object(scene, rng)
            objects = (absent, second) if rng.random() < 0.5 else (first, absent)
            if objects[0].color != objects[1].color and objects[0].shape != objects[1].shape:
                return _ask_where(scene, *objects, right)
        opposite = rng.random() < 0.6
        wrong = OPPOSITE[right] if opposite else pick(rng, others(RELATIONS, right))
        return _ask_where(scene, first, second, wrong)
    if open_question:
        return _ask_look(scene, element_type, thing)
    if element_type == "size":
        return _ask_look(scene, "size", thing, pick(rng, SIZES))
    if element_type == "background":
        right = other = scene.background
    else:
        right = getattr(thing, element_type)
        other = getattr(scene.objects[-1 if thing == scene.objects[0] else 0], element_type)
    near = other != right and rng.random() < 0.4
    wrong = other if near else pick(rng, others(_VALUES[element_type], right))
    return _ask_look(scene, element_type, thing, right if truth else wrong)


def training_questions(
    scene: Scene, rng: np.random.Generator, n: int, malformed: Collection[Object] = ()
) -> list[tuple[str, str, str]]:
    """n random (question, answer, element_type) in the wording of `fixed_questions`.

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
        question, answer, element_type, _ = _random_question(scene, rng, pick(rng, types))
        if element_type in ("object", "shape") and not colors.isdisjoint(question.split()):
            if answer not in _YES_NO:
                continue
            answer = "no"
        rows.append((question, answer, element_type))
    return rows
