"""Held-out prompts come in like all others: checked, with their questions, the same every time."""

import pytest

from agfsync_jax.data import questions, records
from agfsync_jax.evaluation.prompts import held_out
from agfsync_jax.prompt_sources import PROMPT_FIELDS, draw_prompts
from configs import micro


@pytest.fixture
def config():
    return micro.get_config("tiny")


def test_rows_by_prompt(config, tmp_path):
    prompts, asked = held_out(config, tmp_path)
    assert len(prompts) == config.evaluate.num_prompts and asked.keys() == prompts.keys()
    assert all(tuple(row) == PROMPT_FIELDS for row in prompts.values())
    assert all(tuple(row) == questions.FIELDS for rows in asked.values() for row in rows)
    assert held_out(config, tmp_path) == (prompts, asked)
    own = draw_prompts(config.prompts.to_dict(), seed=config.seed, round_index=0)
    assert not {row["prompt"] for row in own} & {row["prompt"] for row in prompts.values()}
    del config.scorers.vqa
    assert held_out(config, tmp_path) == (prompts, {})


def test_every_prompt_needs_a_question(config, tmp_path):
    prompts, _ = held_out(config, tmp_path)
    first, *others = prompts
    own = [{"id": each, "question": "is it?", "answer": "yes"} for each in others]
    records.write_jsonl(tmp_path / "q.jsonl", own)
    config.questions = {"source": "jsonl", "path": str(tmp_path / "q.jsonl")}
    with pytest.raises(ValueError, match=f"1 of {len(prompts)} prompts have no question.*{first}"):
        held_out(config, tmp_path)
