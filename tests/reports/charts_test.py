"""Charts and page parts, at the edges: few values, odd values, text from outside."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from agfsync_jax.reports import charts, pages, panels

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


def test_histogram_with_lines_over_bars():
    groups = {"all": [0.0, 0.0, 1.0, 0.5], "chosen": [1.0], EVIL: [0.0, 0.5]}
    root = parse(charts.histogram("h", groups, bins=4, outlined=("chosen", EVIL)))
    assert len([r for r in root.iter("rect") if r.get("rx") is None]) == 3
    assert len(root.findall("polyline")) == 2
    assert "chosen 1" in [text.text for text in root.iter("text")]


def test_bar_chart():
    root = parse(charts.bar_chart(EVIL, [EVIL, "1"], {"chosen": [3, 1], "rejected": [0, 6]}))
    bars = [float(r.get("height")) for r in root.iter("rect") if r.get("rx") is None]
    assert bars[0] == pytest.approx(3 * bars[2], rel=0.01) and bars[1] == 0
    assert charts.bar_chart("none", [], {}) == ""
    parse(charts.bar_chart("zero", ["a"], {"b": [0]}))


def test_share_chart():
    rows = [(EVIL, {"better": 0.5, "equal": 0.25, "worse": 0.25})]
    rows += [("b", {"better": 1.0, "equal": 0.0, "worse": 0.0})]
    root = parse(charts.share_chart("s", rows))
    widths = [float(r.get("width")) for r in root.iter("rect") if r.get("rx") is None]
    np.testing.assert_allclose(widths, [178, 89, 89, 356, 0, 0])
    texts = [text.text for text in root.iter("text")]
    assert {"50%", "25%", "100%"} <= set(texts) and "0%" not in texts
    assert charts.share_chart("none", []) == ""


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
    assert "crisp" not in large and 'width="192" height="96"' in large and "image/png" in large
    photo = pages.image(png((1024, 512)), "a", max_side=256, photo=True)
    assert "data:image/jpeg" in photo and 'width="256" height="128"' in photo
    assert "data:image/png" in pages.image(png((64, 64)), "a", photo=True)


def test_figures_of_two_and_of_many():
    side = ("chosen", pages.image(png((64, 64)), "a"), "score 1")
    assert 'class="duo"' in pages.figures(EVIL, [side] * 2)
    many = pages.figures(EVIL, [side, ("2", "", ""), (EVIL, "", "")], "below")
    assert 'class="quartet"' in many and '<figure class="2">' in many and "below" in many
    assert "<script" not in many


def test_answers_of_two_images():
    def row(answer, correct):
        return {"question": EVIL, "expected": "yes", "answer": answer, "correct": correct}

    first = [row("yes", True), row("yes", True), row(None, False)]
    second = [row("yes", True), row("<b>", False), row("no", False)]
    text = panels.answer_table(first, second, ("chosen", "rejected"), shown=2)
    assert "<th>chosen</th><th>rejected</th>" in text and "1 more" in text
    assert "<script" not in text and "<b>" not in text
    assert text.index("&lt;b&gt;") < text.index("no answer") < text.index("1 more")


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
