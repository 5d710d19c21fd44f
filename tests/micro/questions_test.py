"""Questions have the answers that their words have, and cover what the referee checks."""

import collections
import re

import numpy as np

from agfsync_jax.micro import referee
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.grammar import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    plural,
)
from agfsync_jax.micro.questions import (
    ANSWERS,
    ELEMENT_TYPES,
    VOCABULARY,
    fixed_questions,
    training_questions,
)
from agfsync_jax.micro.scenes import (
    sample_scenes,
)


def true_answer(scene: Scene, question: str) -> str:
    """Answers from the scene by reading the words of the question, apart from the code above."""
    yes = {True: "yes", False: "no"}
    placed = {(thing.color, thing.shape) for thing in scene.objects}
    number = {"one": 1, "two": 2, "three": 3, "four": 4}
    words = re.sub(r"to the (left|right) of", r"\1", question.rstrip("?")).split()

    def single(noun):
        return {"crosses": "cross"}.get(noun, noun.removesuffix("s") if noun != "cross" else noun)

    def by(**wanted):
        found = [o for o in scene.objects if all(getattr(o, k) == v for k, v in wanted.items())]
        assert len(found) == 1, question
        return found[0]

    def count_of(rest):
        if rest == ["objects"]:
            return scene.count
        there = (rest[0], single(rest[1])) in placed
        return 0 if not there else scene.count if scene.kind == "count" else 1

    match words:
        case ["is", "there", "a", color, shape]:
            return yes[(color, shape) in placed]
        case ["what", "color", "is", "the", "background"]:
            return scene.background
        case ["is", "the", "background", background]:
            return yes[background == scene.background]
        case ["what", "color", _, "the", noun]:
            return by(shape=single(noun)).color
        case ["what", "shape", _, "the", color, _]:
            return by(color=color).shape
        case ["what", "size", "is", "the", color, shape]:
            by(color=color, shape=shape)
            return scene.size
        case ["is", "the", color, shape, ("small" | "large") as size]:
            by(color=color, shape=shape)
            return yes[size == scene.size]
        case ["how", "many", *rest, "are", "there"]:
            return [*number][count_of(rest) - 1]
        case ["are", "there", many, *rest]:
            return yes[count_of(rest) == number[many]]
        case ["are", "the", noun, color]:
            return yes[by(shape=single(noun)).color == color]
        case ["is", "the", shape, color]:
            return yes[by(shape=shape).color == color]
        case ["is", "the", color, "object", "a", shape]:
            return yes[by(color=color).shape == shape]
        case ["are", "the", color, "objects", noun]:
            return yes[by(color=color).shape == single(noun)]
        case ["where", "is", "the", c1, s1, "relative", "to", "the", c2, s2]:
            word = re.search("above|below|left|right", scene.relation)[0]
            told = (by(color=c1, shape=s1), by(color=c2, shape=s2)) == scene.objects
            flip = {"above": "below", "below": "above", "left": "right", "right": "left"}
            return word if told else flip[word]
        case ["where", "is", "the", c1, s1]:
            (other,) = [o for o in scene.objects if (o.color, o.shape) != (c1, s1)]
            return true_answer(scene, f"where is the {c1} {s1} relative to the {other}?")
        case ["is", "the", c1, s1, relation, "the", c2, s2]:
            if not {(c1, s1), (c2, s2)} <= placed:
                return "no"
            where = f"where is the {c1} {s1} relative to the {c2} {s2}?"
            return yes[true_answer(scene, where) == relation]
    raise AssertionError(f"no rule for {question!r}")


def test_every_question_has_the_answer_that_its_words_have():
    for scene in sample_scenes(np.random.default_rng(1), 400, "all", unique=True):
        rows = fixed_questions(scene)
        assert rows == fixed_questions(scene)
        assert 8 <= len(rows) <= 13
        assert len({row["question"] for row in rows}) == len(rows)
        for row in rows:
            assert row["answer"] == true_answer(scene, row["question"]), (scene, row)
            assert row["answer"] in row["choices"] and len(set(row["choices"])) >= 2
            assert set(row["choices"]) <= set(ANSWERS)
            assert row["element_type"] in ELEMENT_TYPES and row["element"]
        yes_no = [row["answer"] for row in rows if row["choices"] == ["yes", "no"]]
        assert {"yes", "no"} == set(yes_no)
        assert len(yes_no) < len(rows)


def test_the_questions_cover_every_check_of_the_referee():
    generator = np.random.default_rng(2)
    for scene in sample_scenes(generator, 60, "all"):
        checks = referee.judge(render(scene, generator), scene)
        checked = {key.split(":")[0] for key in checks}
        assert checked == {row["element_type"] for row in fixed_questions(scene)}
        assert all(type(passed) is bool for passed in checks.values())  # goes into JSON


def test_training_questions_are_true_balanced_and_cover_the_fixed_wording():
    generator = np.random.default_rng(3)
    answers, types, asked = collections.Counter(), collections.Counter(), collections.Counter()
    for scene in sample_scenes(generator, 1500, "all"):
        for question, answer, element_type in training_questions(scene, generator, 6):
            assert answer == true_answer(scene, question), (scene, question)
            answers[answer] += 1
            types[element_type] += 1
            asked[template(question)] += 1
    assert 0.45 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.55
    assert set(types) == set(ELEMENT_TYPES)
    assert min(types["spatial"], types["shape"], types["counting"]) > types["background"]
    fixed = {
        template(row["question"])
        for scene in sample_scenes(generator, 200, "all")
        for row in fixed_questions(scene)
    }
    assert fixed <= set(asked)


def test_malformed_objects_have_no_shape_and_keep_the_rest():
    generator = np.random.default_rng(5)
    steady, spoiled = [], []
    for scene in sample_scenes(generator, 200, "all"):
        unsteady = render(scene, generator, dict.fromkeys(scene.objects, (0.04, 0.1)))
        steady.append(referee.strict(referee.judge(unsteady, scene)))
        bent = scene.objects[0]
        checks = referee.judge(render(scene, generator, {bent: (0.15, 0.3)}), scene)
        spoiled.append([checks[f"{kind}:{bent}"] for kind in ("shape", "object", "color")])
        if scene.kind == "pair":
            assert checks[f"object:{scene.objects[1]}"]
        rows = training_questions(scene, generator, 20, [bent])
        for question, answer, element_type in rows:
            if element_type in ("object", "shape") and bent.color in question.split():
                assert answer == "no", question
            else:
                assert answer == true_answer(scene, question), question
    assert np.mean(steady) > 0.95
    shape, thing, color = np.mean(spoiled, axis=0)
    # Of a group one copy that is still a shape is enough to be there.
    assert shape < 0.1 and thing < 0.2 and color > 0.95


def template(question: str) -> str:
    for names, slot in (
        (COLORS, "COLOR"),
        ([plural(shape) for shape in SHAPES], "SHAPES"),
        (SHAPES, "SHAPE"),
        (BACKGROUNDS, "BACKGROUND"),
    ):
        question = re.sub(rf"\b({'|'.join(names)})\b", slot, question)
    return question


def test_the_vocabulary_is_exactly_the_words_in_use():
    generator = np.random.default_rng(4)
    words = set(ANSWERS)
    for scene in sample_scenes(generator, 1500, "all"):
        texts = [scene.caption(), *(row["question"] for row in fixed_questions(scene))]
        texts += [question for question, _, _ in training_questions(scene, generator, 4)]
        words |= set(re.findall("[a-z]+", " ".join(texts)))
    assert VOCABULARY == tuple(sorted(words))
    assert len(set(ANSWERS)) == len(ANSWERS)
