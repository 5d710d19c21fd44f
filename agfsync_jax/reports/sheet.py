"""before_after.png: a sheet of small cards, base beside tuned, for a README."""

import bisect
import functools
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image

from agfsync_jax.reports.charts import no_word_of_letters

COLUMNS, TILE = 4, 128  # cards in a row; the side of a picture in pixels, of which small ones grow
PAD, GAP, HEADING, TOP, FOOT = 16, 18, 26, 42, 36
CARD = 2 * TILE + 4
INK, BASE, TUNED = "#1c2330", "#5b6575", "#2457d6"
LONGEST = 200  # characters of a caption that can be seen
DEFAULT = "DejaVu Sans"  # comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and more


Side = tuple[bytes, str]  # a PNG and the line below it


@no_word_of_letters()
def draw(groups: Mapping[str, Sequence[tuple[str, Side, Side]]]) -> Image.Image:
    """Cards under headings, {heading: [(prompt, base, tuned)]}.

    Scripts that the default font lacks are drawn with fonts of this machine that have them, from
    right to left where they run so. Where no font has a letter, a box stands for it.
    """
    groups = {heading: cards for heading, cards in groups.items() if cards}
    rows = {heading: math.ceil(len(cards) / COLUMNS) for heading, cards in groups.items()}
    width = 2 * PAD + COLUMNS * (CARD + GAP) - GAP
    height = 2 * PAD + sum(HEADING + count * (TOP + TILE + FOOT) for count in rows.values())
    canvas = _Canvas(width, height)
    y = PAD
    for heading, cards in groups.items():
        canvas.write(heading, PAD, y, size=16)
        y += HEADING
        for i, (prompt, *sides) in enumerate(cards):
            left = PAD + i % COLUMNS * (CARD + GAP)
            above = y + i // COLUMNS * (TOP + TILE + FOOT) + TOP
            lines = canvas.wrap(prompt, size=12, width=CARD)
            for k, line in enumerate(reversed(lines)):
                canvas.write(line, left, above - 20 - 17 * k, size=12, width=CARD)
            for (png, note), color in zip(sides, (BASE, TUNED), strict=True):
                canvas.paste(png, left, above)
                canvas.write(note, left, above + TILE + 3, size=11, color=color)
                left += TILE + 4
        y += rows[heading] * (TOP + TILE + FOOT)
    canvas.figure.canvas.draw()
    return Image.fromarray(np.asarray(canvas.figure.canvas.buffer_rgba())).convert("RGB")


class _Canvas:
    """White paper of pixels, from the top left corner."""

    def __init__(self, width: int, height: int):
        self.height = height
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # a point is a pixel
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def write(
        self, text: str, x: float, y: float, *, size: float, color: str = INK, width: float = 0
    ) -> None:
        """A line whose top is at y; one of a script from right to left ends at x + width."""
        strong = (unicodedata.bidirectional(letter) for letter in text)
        way = next((each for each in strong if each in ("L", "R", "AL")), "L")
        left, align = (x, "left") if way == "L" or not width else (x + width, "right")
        self.figure.text(
            left / self.figure.bbox.width,
            1 - (y + size) / self.height,
            text,
            ha=align,
            color=color,
            fontproperties=FontProperties(family=families(text), size=size),
            parse_math=False,
        )

    def wrap(self, text: str, *, size: float, width: float) -> list[str]:
        """The text in at most two lines; what does not fit ends in an ellipsis."""
        text = " ".join(text[: 2 * LONGEST].split())[:LONGEST]
        font = FontProperties(family=families(text), size=size)

        def fitting(line: str, end: str = "") -> int:
            """How many letters of the line fit, followed by `end`."""
            measure = self.renderer.get_text_width_height_descent
            counts = range(1, len(line) + 1)
            return bisect.bisect(
                counts, width, key=lambda n: measure(line[:n] + end, font, False)[0]
            )

        first = max(fitting(text), 1)
        if first >= len(text):
            return [text]
        if (space := text.rfind(" ", 0, first + 1)) > 0:
            first = space
        rest = text[first:].strip()
        if fitting(rest) < len(rest):
            rest = rest[: fitting(rest, "…")].rstrip() + "…"
        return [text[:first], rest]

    def paste(self, png: bytes, x: int, y: int) -> None:
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        scale = TILE / max(picture.size)
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], method)
        self.figure.figimage(np.asarray(picture), x, self.height - y - picture.height)


def families(text: str) -> list[str]:
    """Fonts that together have the letters of a text, as far as this machine has such fonts."""
    found = [DEFAULT]
    for letter in dict.fromkeys(text):
        if letter.isprintable() and not any(ord(letter) in _letters(name) for name in found):
            more = (name for name in _fonts() if ord(letter) in _letters(name))
            found += [name] if (name := next(more, "")) else []
    return found


@functools.cache
def _fonts() -> dict[str, tuple[str, int]]:
    """{family: (file, its place there)} of upright fonts of common weight, without serifs first."""
    plain = [
        (" Sans" not in each.name, each.index, each.name, each.fname)
        for each in fontManager.ttflist
        if each.style == "normal" and each.weight in (400, "normal", "regular")
    ]
    fonts = {}
    for _, index, name, path in sorted(plain):
        if not name.startswith("Last Resort"):  # has a box for every letter
            fonts.setdefault(name, (path, index))
    return fonts


@functools.cache
def _letters(family: str) -> frozenset[int]:
    """Code points that a font has."""
    path, index = _fonts()[family]
    return frozenset(FT2Font(path, face_index=index).get_charmap())
