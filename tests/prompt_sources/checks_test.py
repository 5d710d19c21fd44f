"""What a source gives is checked as it comes in, whoever asks for it."""

from types import SimpleNamespace

import pytest

from agfsync_jax.data import questions
from agfsync_jax.prompt_sources import PROMPT_FIELDS, ask_questions, draw_prompts
from agfsync_jax.utils import modules

SPEC = {"source": "made_up", "num_prompts": 2, "split": "train", "style": "plain"}


@pytest.fixture
def source(monkeypatch):
    """Two prompts with one question each; a test changes the rows."""
    rows = [dict.fromkeys(PROMPT_FIELDS, "") | {"id": i, "note": "mine"} for i in ("p0", "p1")]
    plain = dict.fromkeys(questions.FIELDS, "") | {"choices": ["yes", "no"], "answer": "yes"}
    asked = [plain | {"id": row["id"], "question": "q?", "note": "mine"} for row in rows]

    def prompts(num_prompts, *, split, seed, round_index, style):
        assert (num_prompts, split, seed, round_index, style) == (2, "train", 7, 3, "plain")
        return rows

    made = SimpleNamespace(prompts=prompts, questions=lambda prompt_rows, *, seed: asked)
    monkeypatch.setattr(modules, "load", lambda room, name: made)
    return SimpleNamespace(rows=rows, asked=asked)


def test_rows_have_their_fields_and_no_others(source):
    rows = draw_prompts(SPEC, seed=7, round_index=3)
    assert [row["id"] for row in rows] == ["p0", "p1"]
    assert all(tuple(row) == PROMPT_FIELDS for row in rows)
    asked = ask_questions({"source": "made_up"}, rows, seed=7)
    assert all(tuple(row) == questions.FIELDS for row in asked) and len(asked) == 2


def test_each_prompt_has_an_id_of_its_own(source):
    source.rows[1]["id"] = "p0"
    with pytest.raises(ValueError, match="'made_up' gave 2 rows with 1 ids: expected 2 rows"):
        draw_prompts(SPEC, seed=7, round_index=3)
    del source.rows[1]
    with pytest.raises(ValueError, match="'made_up' gave 1 rows with 1 ids: expected 2 rows"):
        draw_prompts(SPEC, seed=7, round_index=3)


def test_questions_can_be_asked(source):
    source.asked[0]["answer"] = "maybe"
    with pytest.raises(ValueError, match="question of prompt p0: 'q.' expects 'maybe'"):
        ask_questions({"source": "made_up"}, source.rows, seed=7)
