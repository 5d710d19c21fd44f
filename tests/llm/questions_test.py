"""What is kept of a model's questions: each kind of loss under its name, in all three styles."""

import json

import pytest

from agfsync_jax.data.questions import fault
from agfsync_jax.llm import questions
from agfsync_jax.llm.questions import Examiner
from agfsync_jax.llm.requests import Answer
from tests.llm_server import ask

ROW = {"id": "r000-00007", "prompt": "Two red horses beside a box of 3 berries."}


def read(items, style="yes_no", before=(), examiner=None):
    examiner = examiner or Examiner(style)
    answer = Answer("questions-000-r000-00007", json.dumps({"questions": items}), "stop")
    return examiner.questions(answer, ROW, before), examiner


def test_good_questions_are_rows_of_tifa():
    items = [ask("Are there horses?", "animal", "horses"), ask("Are they red?", "Color", "red")]
    rows, examiner = read(items)
    assert [row["element_type"] for row in rows] == ["animal", "color"]
    assert all(not fault(row) and row["id"] == ROW["id"] for row in rows)
    assert {(row["caption"], row["answer"], tuple(row["choices"])) for row in rows} == {
        (ROW["prompt"], "yes", ("yes", "no"))
    }
    assert examiner.read == 2 and not examiner.dropped


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (7, "not a question"),
        ({"type": "color"}, "not a question"),
        (ask("Red?", "color", "red"), "empty or too short"),
        (ask("I'm sorry, I cannot", "color", "red"), "refusals"),
        (ask("Are the horses calm?", "mood", "horses"), "unknown type"),
        (ask("Are the horses calm?", "animal", ""), "no element"),
        (ask("Is there a dog?", "animal", "dog"), "element not in the caption"),
        (ask("Are there black horses?", "animal", "black horses"), "element not in the caption"),
        (ask("What color are the horses?", "color", "red"), "no yes/no question"),
        (ask("Is it red?", "color", "red") | {"answer": "no"}, "answer other than yes"),
        (ask("are there HORSES", "animal", "horses"), "repeated"),
    ],
)
def test_others_are_dropped_and_counted(item, why):
    first = ask("Are there horses?", "animal", "horses")
    rows, examiner = read([first, item])
    assert [row["question"] for row in rows] == ["Are there horses?"]
    assert examiner.read == 2 and examiner.dropped == {why: 1} and len(examiner.examples[why]) == 1


@pytest.mark.parametrize("element", ["horse", "the boxes", "berry", "three berries", "2 horses"])
def test_an_element_may_stand_in_another_number(element):
    rows, _ = read([ask("Is it there?", "object", element)])
    assert len(rows) == 1


def test_nothing_of_a_first_sampling_is_repeated():
    first, _ = read([ask("Are there horses?", "animal", "horses")])
    second, examiner = read(
        [ask("Are there horses?", "animal", "horses"), ask("Is it red?", "color", "red")],
        before=first,
    )
    assert [row["question"] for row in second] == ["Is it red?"]
    assert examiner.dropped["repeated"] == 1


def test_multiple_choice():
    def item(choices, answer):
        return ask("How many horses?", "counting", "horses") | {
            "choices": choices,
            "answer": answer,
        }

    for choices, answer, wanted in (
        (["1", "2", "3", "4"], "2", "2"),
        (["red", "Blue "], "blue.", "Blue"),
        (["red", "red"], "red", "no choices"),
        (["red", "blue"], "green", "answer not among the choices"),
        (None, "yes", "yes"),
    ):
        rows, examiner = read([item(choices, answer)], "multiple_choice")
        if rows:
            assert rows[0]["answer"] == wanted and not fault(rows[0])
        else:
            assert examiner.dropped[wanted] == 1


def test_a_scene_graph_keeps_its_dependencies():
    """Numbers of the answer become places among the questions that are left."""
    items = [
        {"tuple": "entity - whole (horses)", "question": "Are there horses?", "depends_on": []},
        {"tuple": "entity - whole (dog)", "question": "Is there a dog?", "depends_on": []},
        {
            "tuple": "attribute - color (horses, red)",
            "question": "Are the horses red?",
            "depends_on": [1, 2, 3, 9],
        },
        {"tuple": "other - count (horses, ==2)", "question": "Are there two?", "depends_on": [1]},
        {
            "tuple": "5 | relation - spatial (horses, box, beside)",
            "question": "Are they beside a box?",
            "depends_on": [1, 3],
        },
        {"tuple": "nonsense", "question": "Is it so?", "depends_on": []},
    ]
    rows, examiner = read(items, "dsg")
    assert [row["dependency"] for row in rows] == [[], [0], [0], [0, 1]]
    kinds = [row["element_type"] for row in rows]
    assert kinds == ["object", "color", "counting", "spatial"]
    assert examiner.dropped["element not in the caption"] == 1
    assert examiner.dropped["unknown type"] == 1
    more, _ = read(
        [{"tuple": "entity - whole (berries)", "question": "Are there berries?", "depends_on": []}]
        + [{"tuple": "global - (3)", "question": "Are there three?", "depends_on": [1, 2]}],
        "dsg",
        before=rows,
    )
    assert [row["dependency"] for row in more] == [[], [4]]


def test_what_the_caption_answers_otherwise_is_dropped():
    rows, examiner = read(
        [
            {"tuple": "entity - whole (horses)", "question": "Are there horses?", "depends_on": []},
            {"tuple": "entity - part (box)", "question": "Is the box open?", "depends_on": []},
            {"tuple": "color (red)", "question": "Are they red?", "depends_on": [1, 2]},
        ],
        "dsg",
    )
    said = Answer("c", json.dumps({"answers": ["Yes.", "unknown", "yes"]}), "stop")
    left = examiner.confirmed(said, rows)
    assert [row["question"] for row in left] == ["Are there horses?", "Are they red?"]
    assert [row["dependency"] for row in left] == [[], [0]]
    assert examiner.dropped["the caption answers otherwise"] == 1
    short = Answer("c", json.dumps({"answers": ["no"]}), "stop")
    for unclear in (short, None, Answer("c", error="x")):
        assert examiner.confirmed(unclear, rows) == rows
    assert examiner.remarks["could not be checked, and are kept"] == 9


def test_a_tenth_of_the_tokens_of_six_calls():
    """By a count of characters: six answers in the released code's six fields, as it repeats the
    question until six could be parsed, against one in ours."""
    settings = {"model": "m", "max_tokens": 9, "temperature": 0.0, "top_p": 1.0}
    more = {"wave": 0, "style": "yes_no", "number": 15, "key": [0]}
    (row,) = questions.write_requests([ROW], **more, **settings)
    asked = sum(len(each["content"]) for each in row["body"]["messages"])
    items = [ask(f"Is there a red horse beside box {i}?", "spatial", "beside") for i in range(15)]
    ours = asked + len(json.dumps({"questions": items}))
    theirs = [
        {"question_id": i, "question": each["question"], "answer": "yes"}
        | {"element_type": each["type"], "element": each["element"], "flag": 1}
        for i, each in enumerate(items)
    ]
    six = 6 * (2_800 + len(json.dumps(theirs, indent=4)))  # its instructions have 2,800 characters
    assert six / ours > 8
