"""Which questions can be asked, and of whom: one rule for those that come in and those on disk."""

import pytest

from agfsync_jax.data import questions

PROMPTS = [{"id": "p0", "prompt": "a cat"}, {"id": "p1", "prompt": "a dog"}]


def row(prompt_id="p0", **changes):
    filled = dict.fromkeys(questions.FIELDS, "")
    asked = {"id": prompt_id, "question": "q?", "choices": ["yes", "no"], "answer": "yes"}
    return filled | asked | changes


BAD = [
    ({"question": " "}, "the question is empty"),
    ({"answer": "x"}, r"'q\?' expects 'x' of the choices \['yes', 'no'\]"),
    ({"choices": ["yes"]}, "expects 'yes' of the choices"),
    ({"choices": ["yes", "no", "no"]}, "expects 'yes' of the choices"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_bad_question_is_refused(changes, message):
    good = [row("p0"), row("p1")]
    questions.check(PROMPTS, good)
    with pytest.raises(ValueError, match=f"question of prompt p1: .*{message}"):
        questions.check(PROMPTS, [*good, row("p1", **changes)])


def test_missing_fields_and_prompts():
    lacking = {key: value for key, value in row().items() if key not in ("answer", "element")}
    with pytest.raises(ValueError, match="p0: the question has no answer, element; expected id"):
        questions.check(PROMPTS, [lacking, row("p1")])
    with pytest.raises(ValueError, match=r"1 of 2 prompts have no question.* p1 \('a dog'\)"):
        questions.check(PROMPTS, [row("p0")])


def test_what_cannot_be_asked_is_sorted_out():
    good, bad = row("p0"), row("p1", answer="maybe")
    asked, problems = questions.askable(PROMPTS, [good, bad])
    assert asked == {"p0": [good]}
    assert [(each["kind"], each["where"]) for each in problems] == [
        ("bad_questions", "prompt p1"),
        ("no_questions", "prompt p1"),
    ]


def test_dependencies_follow_the_questions_that_are_left():
    """Of those that are sorted out nothing depends on anything."""
    parent, bad = row(question="a?"), row(question="b?", answer="maybe")
    child = row(question="c?", dependency=[0, 1])
    last = row(question="d?", dependency=[2])
    asked, _ = questions.askable(PROMPTS[:1], [parent, bad, child, last])
    assert [each["question"] for each in asked["p0"]] == ["a?", "c?", "d?"]
    assert [each.get("dependency") for each in asked["p0"]] == [None, [0], [1]]
    for wrong in ("0", [0.5], [True], None):
        with pytest.raises(ValueError, match="'q.' depends on .*, which are no places"):
            questions.check(PROMPTS[:1], [row(dependency=wrong)])
