"""`agfsync questions`: every prompt gets questions in TIFA's fields, before anything is drawn."""

import pytest

from agfsync_jax import prompts, questions
from agfsync_jax.data import records
from configs import micro

FIELDS = ["id", "caption", "question", "choices", "answer", "element_type", "element"]


@pytest.fixture
def config():
    return micro.get_config("tiny")


def test_every_prompt_has_questions(config, tmp_path, capsys):
    prompts.main(config, tmp_path)
    questions.main(config, tmp_path)
    path = tmp_path / "round_000/questions.jsonl"
    rows, asked = records.read_jsonl(path.with_name("prompts.jsonl")), records.read_jsonl(path)
    assert all(list(row) == FIELDS for row in asked)
    assert {row["id"] for row in asked} == {row["id"] for row in rows}
    before = path.stat().st_mtime_ns
    questions.main(config, tmp_path)
    assert path.stat().st_mtime_ns == before
    assert "questions: skipped 1 of 1" in capsys.readouterr().err


def test_prompts_come_first(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="run `agfsync prompts` first"):
        questions.main(config, tmp_path)


def test_nobody_asks(config, tmp_path, capsys):
    del config.scorers.vqa
    questions.main(config, tmp_path)
    assert not (tmp_path / "round_000/questions.jsonl").exists()
    assert "no scorer of this config asks any" in capsys.readouterr().err


def test_a_prompt_without_a_question(config, tmp_path):
    prompts.main(config, tmp_path)
    rows = records.read_jsonl(tmp_path / "round_000/prompts.jsonl")
    own = [{"id": row["id"], "question": "is it?", "answer": "yes"} for row in rows[1:]]
    records.write_jsonl(tmp_path / "q.jsonl", own)
    config.questions = {"source": "jsonl", "path": str(tmp_path / "q.jsonl")}
    with pytest.raises(ValueError, match=f"1 of {len(rows)} prompts have no question.*r000-00000"):
        questions.main(config, tmp_path)
    assert not (tmp_path / "round_000/questions.jsonl").exists()
