"""The verdict: every outcome of judge and scorer in words."""

import dataclasses

import pytest

from agfsync_jax.data.columns import Column
from agfsync_jax.reports.formats import describe
from agfsync_jax.reports.panels.verdict import verdict
from agfsync_jax.reports.rounds import Report, Round

EMPTY = {field.name: {} for field in dataclasses.fields(Round)}
UP, DOWN, FLAT = (0.01, 0.03), (-0.03, -0.01), (-0.01, 0.01)


def interval(low: float, high: float) -> dict:
    return {"mean": (low + high) / 2, "low": low, "high": high}


def report(delta: dict, judges=("judge",), columns=()) -> Report:
    values = {name: interval(0.5, 0.6) for name in delta}
    found = {name: interval(*ends) for name, ends in delta.items()}
    last = Round(**EMPTY | {"base": values, "tuned": values, "delta": found})
    judges = [name for name in judges if name in delta]
    return Report(
        "",
        [last],
        describe(delta, dict(columns) or dict.fromkeys(delta, Column())),
        judges,
        "",
        "",
        {},
    )


@pytest.mark.parametrize(
    ("delta", "says", "words"),
    [
        ({"judge": UP, "score": UP}, "good", "better"),
        ({"judge": DOWN, "score": DOWN}, "bad", "worse"),
        ({"judge": FLAT, "score": FLAT}, "", "no clear"),
        ({"judge": FLAT, "score": UP}, "warn", "Warning: the score score"),
        ({"judge": DOWN, "score": UP}, "bad", "Warning: the score score"),
        ({"judge": UP, "score": UP, "looks": DOWN}, "good", "The looks score gets worse"),
        ({"judge": UP}, "good", "better"),
        ({"score": UP}, "", "No independent judge"),
        ({"score": DOWN}, "bad", "score gets worse on held-out prompts"),
        ({}, "", "No evaluation yet"),
    ],
)
def test_verdict(delta, says, words):
    found, sentences = verdict(report(delta))
    assert found == says
    assert words in " ".join(sentences)
    assert ("Warning" in " ".join(sentences)) == ("Warning" in words)


def test_lower_is_better():
    columns = {"judge": Column("errors seen", ".1f", higher_is_better=False), "score": Column()}
    found, sentences = verdict(report({"judge": DOWN, "score": UP}, columns=columns))
    assert found == "good" and "better than the base" in sentences[0]
    assert sentences[1].startswith("Errors seen: 0.6 → 0.6, −0.0")
    assert verdict(report({"judge": UP, "score": UP}, columns=columns))[0] == "bad"


def test_the_first_column_decides():
    columns = {"b": Column(), "a": Column()}
    delta = {"a": DOWN, "b": UP}
    assert "b improves" in verdict(report(delta, (), columns))[1][0]
    assert "a gets worse" in verdict(report(delta, (), {"a": Column(), "b": Column()}))[1][0]
