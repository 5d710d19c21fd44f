"""The micro world as a source: different captions, one split, other prompts each round."""

import pytest

from agfsync_jax.micro.grammar import KINDS, parse_caption
from agfsync_jax.micro.questions import ELEMENT_TYPES
from agfsync_jax.micro.scenes import is_heldout
from agfsync_jax.prompt_sources import micro


def draw(num_prompts=60, *, split="train", seed=0, round_index=0):
    return micro.prompts(num_prompts, split=split, seed=seed, round_index=round_index)


def test_prompts_are_different_captions_of_the_split():
    for split in ("train", "test"):
        rows = draw(split=split)
        assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 60
        assert all(is_heldout(parse_caption(row["prompt"])) == (split == "test") for row in rows)
        assert {row["category"] for row in rows} == set(KINDS)
        assert all(parse_caption(row["prompt"]).kind == row["category"] for row in rows)
    assert draw()[12]["id"] == "r000-00012"
    assert draw(split="test", round_index=2)[3]["id"] == "test-r002-00003"
    halves = [{r["prompt"] for r in draw(600, split=split)} for split in ("validation", "test")]
    assert len(halves[0] | halves[1]) == 1200
    assert all(is_heldout(parse_caption(prompt)) for prompt in halves[0])


def test_seed_and_round_choose_the_prompts():
    assert draw() == draw()
    texts = [
        {row["prompt"] for row in rows} for rows in (draw(), draw(seed=1), draw(round_index=1))
    ]
    assert len(texts[0] & texts[1]) < 30 and len(texts[0] & texts[2]) < 30


def test_unknown_split_and_too_many():
    with pytest.raises(ValueError, match="heldout"):
        draw(split="dev")
    with pytest.raises(ValueError, match="unique scenes"):
        draw(10**6)


def test_questions_have_tifas_fields():
    rows = draw(5)
    questions = micro.questions(rows, seed=0)
    prompts = {row["id"]: row["prompt"] for row in rows}
    assert {question["id"] for question in questions} == set(prompts)
    for question in questions:
        assert question["caption"] == prompts[question["id"]]
        assert question["answer"] in question["choices"]
        assert question["element_type"] in ELEMENT_TYPES
    with pytest.raises(ValueError, match="an astronaut"):
        micro.questions([{"id": "x", "prompt": "an astronaut"}], seed=0)
