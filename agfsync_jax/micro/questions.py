"""Questions about the micro world's scenes: a fixed set for each, and random ones to train on."""

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
ELEMENT_TYPES = ("object", "color", "shape", "counting", "spatial", "size", "background")
ANSWERS = (
    *_YES_NO,
    *COLORS,
    *SHAPES,
    *NUMBER_WORDS.values(),
    *DIRECTION.values(),
    *SIZES,
    *BACKGROUNDS,
)
VOCABULARY = tuple(
    sorted(
        set(ANSWERS)
        | set(SINGULAR)
        | set(" ".join(RELATIONS).split())
        | set("a on background is there are the what color shape size".split())
        | set("how many where relative to object objects".split())
    )
)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


# One function a wording; each returns (question, answer, element type, element).


def _ask_object(scene: Scene, thing: Object):
    return f"is there a {thing}?", _yes_no(thing in scene.objects), "object", str(thing)


def _the(scene: Scene, noun: str) -> str:
    return f"are the {plural(noun)}" if scene.kind == "count" else f"is the {noun}"


def _ask_color(scene: Scene, thing: Object):
    return f"what color {_the(scene, thing.shape)}?", thing.color, "color", thing.color


def _ask_if_color(scene: Scene, thing: Object, color: str):
    question = f"{_the(scene, thing.shape)} {color}?"
    return question, _yes_no(color == thing.color), "color", color


def _ask_shape(scene: Scene, thing: Object):
    question = f"what shape {_the(scene, f'{thing.color} object')}?"
    return question, thing.shape, "shape", thing.shape


def _ask_if_shape(scene: Scene, thing: Object, shape: str):
    noun = plural(shape) if scene.kind == "count" else f"a {shape}"
    question = f"{_the(scene, f'{thing.color} object')} {noun}?"
    return question, _yes_no(shape == thing.shape), "shape", shape


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
    return OPPOSITE[scene.relation] if scene.objects == (second, first) else None


def _ask_where(scene: Scene, first: Object, second: Object):
    answer = DIRECTION[_relation_of(scene, first, second)]
    return f"where is the {first} relative to the {second}?", answer, "spatial", answer


def _ask_place(scene: Scene, first: Object, second: Object):
    answer = DIRECTION[_relation_of(scene, first, second)]
    return f"where is the {first}?", answer, "spatial", answer


def _ask_if_where(scene: Scene, first: Object, second: Object, relation: str):
    truth = _relation_of(scene, first, second) == relation
    question = f"is the {first} {relation} the {second}?"
    return question, _yes_no(truth), "spatial", DIRECTION[relation]


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
    return [Object(thing.color, shape) for shape in others(SHAPES, thing.shape)] + [
        Object(color, thing.shape) for color in others(COLORS, thing.color)
    ]


_COMPLETE_CHOICES = {
    "size": SIZES,
    "counting": tuple(NUMBER_WORDS.values()),
    "spatial": tuple(DIRECTION.values()),
    "background": tuple(BACKGROUNDS),
}


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
    asked += [_ask_color(scene, thing) for thing in scene.objects]
    asked += [_ask_shape(scene, thing) for thing in scene.objects]
    first = scene.objects[0]
    if scene.kind == "pair":
        second = scene.objects[1]
        asked.append(_ask_if_where(scene, first, second, scene.relation))
        asked.append(_ask_if_where(scene, first, second, OPPOSITE[scene.relation]))
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
    wrong = stable(others(BACKGROUNDS, scene.background), "background")[0]
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
            shown += stable(others(names, *shown), question)
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
    if element_type in ("color", "shape"):
        if open_question:
            return (_ask_color if element_type == "color" else _ask_shape)(scene, thing)
        right = getattr(thing, element_type)
        other = getattr(scene.objects[-1 if thing == scene.objects[0] else 0], element_type)
        names = COLORS if element_type == "color" else SHAPES
        wrong = other if other != right and rng.random() < 0.4 else pick(rng, others(names, right))
        ask = _ask_if_color if element_type == "color" else _ask_if_shape
        return ask(scene, thing, right if truth else wrong)
    if element_type == "counting":
        if open_question:
            return _ask_count(scene, pick(rng, (None, thing)))
        if truth:
            return _ask_if_count(scene, thing if scene.kind == "count" else None, scene.count)
        if scene.kind != "count" and rng.random() < 0.5:  # it is there, but only once
            return _ask_if_count(scene, thing, pick(rng, COUNTS))
        if scene.kind == "count" and rng.random() < 0.25:  # the right number of another thing
            return _ask_if_count(scene, _absent_object(scene, rng), scene.count)
        near = [n for n in COUNTS if abs(n - scene.count) == 1]
        number = pick(rng, near if rng.random() < 0.75 else others(COUNTS, scene.count))
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
        wrong = OPPOSITE[right] if opposite else pick(rng, others(RELATIONS, right))
        return _ask_if_where(scene, first, second, wrong)
    if element_type == "size":
        if open_question:
            return _ask_size(scene, thing)
        return _ask_if_size(scene, thing, pick(rng, SIZES))
    if open_question:
        return _ask_background(scene)
    wrong = pick(rng, others(BACKGROUNDS, scene.background))
    return _ask_if_background(scene, scene.background if truth else wrong)


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
