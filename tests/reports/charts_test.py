"""Charts, at the edges: few values, odd values, text from outside."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from agfsync_jax.data.columns import Column
from agfsync_jax.reports import charts

EVIL, JAPANESE = "<script>alert('$x$')</script>", "赤い猫"
SVG = "{http://www.w3.org/2000/svg}"


def parse(chart: charts.Chart):
    """A chart must be XML: nothing unescaped, everything closed, no number that is not one."""
    assert not re.search(r"\b(nan|inf)\b", chart.svg)
    assert "url(" not in chart.svg and not re.search(r' id="\w+_\d', chart.svg)
    root = ElementTree.fromstring(chart.svg)
    assert root.get("viewBox").startswith("0 0 360 ")
    return root


def texts(root) -> list[str]:
    return [text.text for text in root.iter(f"{SVG}text")]


def paths(root, color: str) -> list[str]:
    found = root.iter(f"{SVG}path")
    return [path.get("d") for path in found if color in path.get("style", "")]


def heights(root, color: str) -> list[float]:
    """Of bars, which are closed paths."""
    ends = [re.findall(r"[\d.]+ ([\d.]+)", path) for path in paths(root, f"fill: {color}")]
    return [max(map(float, y)) - min(map(float, y)) for y in ends]


def test_lines():
    series = {EVIL: ([0, 1, 2], [1.0, float("nan"), 3.0]), "b": ([0], [2.0]), "c": ([], [])}
    chart = charts.lines(EVIL, series, x_label=EVIL, reference=(2, JAPANESE), smooth=2)
    root = parse(chart)
    assert [name for name, _ in chart.keys] == [EVIL, "b"] and chart.title == EVIL
    assert {EVIL, JAPANESE} <= set(texts(root))  # as text, in one piece
    assert charts.lines("empty", {"a": ([], [])}) is None
    flat = {"a": ([1, 2], [0.0, 0.0])}
    parse(charts.lines("flat", flat, bands={"a": ([0, 0], [0, 0])}))
    assert charts.lines("flat", flat).keys == ()


def test_names_of_many_rounds_leave_each_other_room():
    labels = [f"round {i}" for i in range(20)]
    chart = charts.lines("vqa", {"vqa": (range(20), range(20))}, x_labels=labels)
    assert len([text for text in texts(parse(chart)) if text.startswith("round")]) <= 6


def test_moving_average_keeps_a_constant():
    np.testing.assert_allclose(charts.moving_average(np.full(9, 2.5), 4), 2.5)
    np.testing.assert_allclose(charts.moving_average(np.arange(5.0), 1), np.arange(5.0))
    assert charts.moving_average(np.arange(3.0), 99).shape == (3,)


def test_histogram_shows_every_share():
    groups = {"a": [0.0, 0.0, 1.0, float("nan")], "b": [0.5]}
    chart = charts.histogram("h", groups, bins=4)
    root = parse(chart)
    low, high = sorted(heights(root, charts.COLORS[0]))
    assert high / low == pytest.approx(2, rel=0.02)
    assert len(heights(root, charts.COLORS[1])) == 1
    assert chart.keys[0] == ("a: mean 0.333333", charts.COLORS[0])
    assert charts.histogram("none", {"a": []}) is None
    parse(charts.histogram("one", {"a": [3.0]}))
    parse(charts.histogram("zero", {"a": [0.0]}))


def test_histogram_with_lines_over_bars():
    groups = {"all": [0.0, 0.0, 1.0, 0.5], "chosen": [1.0], EVIL: [0.0, 0.5]}
    root = parse(charts.histogram("h", groups, bins=4, outlined=("chosen", EVIL)))
    assert len(heights(root, charts.COLORS[0])) == 3
    assert all(paths(root, f"stroke: {color}") for color in charts.COLORS[1:3])


def test_bars():
    root = parse(charts.bars(EVIL, [EVIL, "1"], {"chosen": [3, 1], "rejected": [0, 6]}))
    first, second = heights(root, charts.COLORS[1])
    assert first == pytest.approx(3 * second, rel=0.02)
    assert {EVIL, "3", "6"} <= set(texts(root))
    assert charts.bars("none", [], {}) is None
    parse(charts.bars("zero", ["a"], {"b": [0]}))


def interval(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def test_dots():
    rows = {EVIL: {"base": interval(0.5), "tuned": interval(0.7)}, "gone": {}}
    chart = charts.dots("d", rows, Column(format=".0%"))
    assert {EVIL, "50% → 70%"} <= set(texts(parse(chart)))
    assert [name for name, _ in chart.keys] == ["base", "tuned"]
    assert charts.dots("d", {"gone": {}}, Column()) is None
    parse(charts.dots("d", {"a": {"base": {"mean": 0, "low": 0, "high": 0}}}, Column()))


def test_the_same_data_makes_the_same_bytes():
    first, second = (charts.lines("a", {"a": ([0, 1], [0.1, 0.2])}).svg for _ in range(2))
    assert first == second and len(first) < 6000
