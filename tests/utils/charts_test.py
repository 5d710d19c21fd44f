"""Charts and page parts, at the edges: few values, odd values, text from outside."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from agfsync_jax.utils import charts, pages, panels

EVIL = "<script>alert('x')</script>"


def parse(svg: str):
    """A chart must be XML: nothing unescaped, everything closed, no number that is not one."""
    assert not re.search(r"\b(nan|inf)\b", svg)
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.003, 0.0021), (5, 5), (0, 0), (-7, -7), (1e5, 3e6), (0.1, 0.3)]
)
def test_ticks_cover_in_round_steps(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert 2 <= len(found) <= 8
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"


def test_line_chart():
    series = {EVIL: ([0, 1, 2], [1.0, float("nan"), 3.0]), "b": ([0], [2.0]), "c": ([], [])}
    root = parse(charts.line_chart(EVIL, series, x_label=EVIL, reference=(2, EVIL), smooth=2))
    assert root.get("viewBox").startswith("0 0 360 ")
    assert len(root.findall("polyline")) == 4
    assert charts.line_chart("empty", {"a": ([], [])}) == ""
    parse(charts.line_chart("flat", {"a": ([1, 2], [0.0, 0.0])}, bands={"a": ([0, 0], [0, 0])}))


def test_moving_average_keeps_a_constant():
    np.testing.assert_allclose(charts.moving_average(np.full(9, 2.5), 4), 2.5)
    np.testing.assert_allclose(charts.moving_average(np.arange(5.0), 1), np.arange(5.0))
    assert charts.moving_average(np.arange(3.0), 99).shape == (3,)


def test_histogram_shows_every_share():
    svg = charts.histogram("h", {"a": [0.0, 0.0, 1.0, float("nan")], "b": [0.5]}, bins=4)
    bars = [r for r in parse(svg).iter("rect") if r.get("rx") is None]
    assert len(bars) == 3  # a at 0 and 1, b at 0.5
    heights = sorted(float(bar.get("height")) for bar in bars)
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.01)
    assert charts.histogram("none", {"a": []}) == ""
    parse(charts.histogram("one", {"a": [3.0]}))


def test_dot_chart():
    rows = [(EVIL, {"base": (0.5, 0.4, 0.6), "tuned": (0.7, 0.6, 0.8)}), ("gone", {})]
    root = parse(charts.dot_chart("d", rows))
    assert len(list(root.iter("circle"))) == 2
    assert charts.dot_chart("d", [("gone", {})]) == ""


def png(size, color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def test_small_images_are_crisp_and_large_ones_shrink():
    small = pages.image(png((64, 64)), EVIL)
    assert 'class="crisp"' in small and 'width="64"' in small and "<script" not in small
    large = pages.image(png((1024, 512)), "a")
    assert "crisp" not in large and 'width="192" height="96"' in large


def test_contact_sheet_of_any_size():
    card = ("a prompt of very many words " * 9, (png((64, 64)), "base"), (png((300, 200)), "tuned"))
    sheet = pages.contact_sheet([("one", [card] * 5), ("none", [])], columns=4)
    assert np.asarray(sheet).std() > 10
    word = ("x" * 400, *card[1:])
    assert pages.contact_sheet([("one", [word])]).width == sheet.width


def test_numbers():
    assert panels.number("vqa", 0.8149) == "81.5%"
    assert panels.number("vqa", 1.0) == "100%"
    assert panels.number("referee", -0.0161, signed=True) == "−1.6 pt"
    assert panels.number("clip", 31.254) == "31.25"
    assert panels.number("other", 0.5, signed=True) == "+0.500"
    interval = {"mean": 0.01, "low": -0.002, "high": 0.02}
    assert panels.between("vqa", interval, signed=True) == "−0.2 to +2.0"
    assert panels.direction(interval) == ""
    assert panels.direction({"low": 0.51, "high": 0.6}, 0.5) == "up"
    assert panels.duration(59.94) == "59.9 s" and panels.duration(3725) == "1 h 02 min"


def test_metrics_without_parts_of_others():
    row = {"prompt_id": "p", "candidate": 0, "referee": 1, "referee/size": 1, "new/a": 1, "vqa": 1}
    assert panels.metric_names([row]) == ["referee", "vqa", "new/a"]
