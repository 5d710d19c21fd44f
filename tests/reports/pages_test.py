"""Parts of pages: pictures, answers, text from outside; a panel of one's own."""

import io
import sys
from types import ModuleType

import pytest
from PIL import Image

from agfsync_jax.reports import pages, panels
from agfsync_jax.reports.cards import Card, Side
from agfsync_jax.utils import modules

EVIL = "<script>alert('x')</script>"


def macro(name: str, *args) -> str:
    return str(getattr(pages.environment().globals["m"], name)(*args))


def png(size, color="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def test_small_pictures_are_crisp_and_large_ones_shrink():
    small = macro("picture", png((64, 64)), EVIL, 512)
    assert 'class="crisp"' in small and 'width="64"' in small and "<script" not in small
    assert "data:image/png" in small
    large = macro("picture", png((1024, 512)), "a", 256)
    assert "crisp" not in large and 'width="256" height="128"' in large
    assert "data:image/jpeg" in large
    assert len(macro("picture", png((8, 8)), "x" * 9999, 512)) < 2000


def card(*names: str, **fields) -> str:
    sides = [Side(name, png((64, 64)), [(EVIL, "1", "better")]) for name in names]
    return macro("card", Card(EVIL, sides, [], **fields))


def test_cards_of_two_and_of_many():
    assert 'class="duo"' in card("chosen", "rejected")
    many = card("best", "2", EVIL, table=[("best", [("1", "better")])], margin="margin 1")
    assert 'class="quartet"' in many and '<figure class="2">' in many and "margin 1" in many
    assert '<td class="better">1</td>' in many
    assert "<script" not in many
    gone = macro("card", Card("a", [Side("chosen", None, [])] * 2, []))
    assert gone.count("no image") == 2


def test_answers_of_two_images():
    def row(answer, correct):
        return {"question": EVIL, "expected": "yes", "answer": answer, "correct": correct}

    pairs = [(row("yes", True), row("<b>", False)), (row(None, False), row("no", False))]
    text = macro("answers", [*pairs, (row("yes", True),) * 2], ("chosen", "rejected"), 2)
    assert "<th>chosen</th><th>rejected</th>" in text and "1 more" in text
    assert "<script" not in text and "<b>" not in text
    assert text.index("&lt;b&gt;") < text.index("no answer") < text.index("1 more")


def test_long_text_is_clipped():
    words = "ab " * 200
    assert macro("text", "short") == "<bdi>short</bdi>"
    assert macro("text", words).count("<details") == 1
    assert f'<summary dir="auto">{words[:200]}…</summary>' in macro("text", words)
    assert macro("prompt", words).count(words) == 1


@pytest.fixture
def panel(monkeypatch):
    """As a file of the folder would."""
    module = ModuleType("agfsync_jax.reports.panels.own")
    module.PANEL = panels.Panel("own", 5, lambda data: {"word": data}, "Own", "<i>{{ word }}</i>")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    known = modules.names("reports.panels")
    monkeypatch.setattr(modules, "names", lambda room: [*known, "own"])
    return module.PANEL


def test_a_panel_of_ones_own(panel):
    text = pages.render("own", EVIL, [EVIL], EVIL, [("a/b.html", EVIL)])
    assert "<h2>Own</h2>" in text and "<i>&lt;script&gt;" in text
    assert '<a href="a/b.html">&lt;script&gt;' in text and "<script" not in text
    with pytest.raises(Exception, match="undefined"):
        object.__setattr__(panel, "template", "{{ nothing }}")
        pages.render("own", "t", [], "")
