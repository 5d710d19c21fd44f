"""What the columns of a config are, told by its scorers and evaluators."""

import pytest

from agfsync_jax.scorers import hpsv2, vqa
from agfsync_jax.scoring import columns
from configs import micro


def test_columns_of_a_config():
    config = micro.get_config("tiny")
    config.scorers.people = {"name": "hpsv2", "path": "anywhere"}  # the block names the column
    found = columns.columns_of(config)
    assert list(found)[:2] == ["referee", "referee_strict"]
    assert [n for n in found if "referee" not in n] == ["vqa", "clip", "people", "aesthetic"]
    assert found["people"] == hpsv2.Scorer.columns["hpsv2"]
    assert found["vqa"].format == found["referee"].format == "%"
    assert found["referee/color"].about == "the referee's checks about color"
    config.evaluate.evaluators = ()
    assert list(columns.columns_of(config)) == ["vqa", "clip", "people", "aesthetic"]


def test_several_columns_have_the_block_before_them():
    assert columns.named("vqa", {"any": 1}) == {"vqa": 1}
    assert columns.named("vqa", {"any": 1, "other": 2}) == {"vqa/any": 1, "vqa/other": 2}


def test_who_asks_questions():
    specs = {"clip": {"name": "clip"}, "faithful": {"name": "vqa"}}
    assert columns.scorer_class("faithful", specs["faithful"]) is vqa.Scorer
    assert columns.asks_questions(specs)
    del specs["faithful"]
    assert not columns.asks_questions(specs)
    with pytest.raises(ValueError, match="config.scorers.clip has no name"):
        columns.asks_questions({"clip": {"path": "x"}})
    with pytest.raises(ValueError, match="'clipp' is not in agfsync_jax/scorers"):
        columns.asks_questions({"clip": {"name": "clipp"}})
