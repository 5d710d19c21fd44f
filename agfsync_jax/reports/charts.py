"""Charts: matplotlib's SVG, to stand in a page; the same data makes the same bytes.

A chart is 360 units wide, so that its lettering keeps its size on a phone; a page sets as many side
by side as fit. Its title and its legend are the page's.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agfsync_jax.data.columns import Column
from agfsync_jax.reports.formats import number, of_axis, percent, plain

COLORS = ("#8b95a5", "#2457d6", "#d9730d", "#0f8a6d", "#8a3ffc", "#c2255c")  # the first is the base
COLORS += ("#00879e", "#8a6d00", "#5c3d99", "#6b4226", "#3f7d20")
ALL, BETTER, WORSE = "#c3cad6", "#0b7a4b", "#b3261e"  # of pairs
INK, FAINT, GRID = "#1c2330", "#667085", "#e6e9ef"
WIDTH, HEIGHT = 360, 190
PLAIN = Column(format=",.6g")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "agfsync",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page sets its own
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.axisbelow": True,
    "axes.labelcolor": FAINT,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.bottom": False,
    "ytick.left": False,
    "lines.solid_joinstyle": "round",
} | {f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")}


class Chart(NamedTuple):
    """What a page shows of a chart.

    Attributes:
        title: above it.
        keys: (name, color) of its legend; () where there is none.
        svg: the drawing.
    """

    title: str
    keys: Sequence[tuple[str, str]]
    svg: Markup


@contextlib.contextmanager
def no_word_of_letters() -> Iterator[None]:
    """Without matplotlib's warning of each letter that its font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def _axes(height: float = HEIGHT, grid: str = "y") -> Axes:
    axes = Figure(figsize=(WIDTH / 72, height / 72), dpi=72).add_subplot()
    axes.grid(axis=grid)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return axes


def _chart(
    title: str,
    keys: Sequence[tuple[str, str]],
    axes: Axes,
    *,
    top: float = 8,
    bottom: float = 22,
    left: float | None = None,
) -> Chart:
    """Fits the axes into their figure and draws it; the left margin follows the labels."""
    height = axes.figure.get_figheight() * 72
    if left is None:
        labels = axes.yaxis.get_major_formatter().format_ticks(axes.get_yticks())
        left = 10 + 6.4 * max(map(len, labels))
    width = WIDTH - 14 - left
    box = left / WIDTH, bottom / height, width / WIDTH, (height - top - bottom) / height
    axes.set_position(box)
    stream = io.StringIO()
    for artist in axes.findobj():
        artist.set_clip_on(False)
    with no_word_of_letters():  # only to measure them: a browser has more fonts
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        axes.figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<defs>\s*<style.*?</defs>| id="[\w.]+_\d+"', "", text, flags=re.DOTALL)

    def shorter(path: re.Match) -> str:  # a tenth of a unit is enough
        return re.sub(r"(\.\d)\d+", r"\1", re.sub(r"\s+", " ", path[0]))

    return Chart(title, keys, Markup(re.sub(r' d="[^"]*"', shorter, text)))


def _letter(axis: Axis, text: Callable[[float], str]) -> None:
    axis.set_major_formatter(lambda value, _: text(value))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over `window` values, over fewer at the ends."""
    window = max(1, min(window, len(values)))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


@matplotlib.rc_context(STYLE)
def lines(
    title: str,
    series: Mapping[str, tuple[Sequence, Sequence]],
    *,
    bands: Mapping[str, tuple[Sequence, Sequence]] | None = None,
    x_label: str = "",
    x_labels: Sequence[str] = (),
    column: Column = PLAIN,
    reference: tuple[float, str] | None = None,
    smooth: int = 1,
) -> Chart | None:
    """Lines over x, {name: (x, y)}; values that are not finite are left out; None without any.

    Args:
        bands: {name: (low, high)}, shaded.
        column: what y is.
        x_labels: name the positions 0, 1, 2, ...
        reference: a dashed level and its name.
        smooth: above 1, the raw line is pale under its moving average.
    """
    clean = {}
    for name, (x, y) in series.items():
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if (known := np.isfinite(y)).any():
            clean[name] = x[known], y[known]
    if not clean:
        return None
    axes = _axes()
    keys = [(name, COLORS[1:][i % len(COLORS[1:])]) for i, name in enumerate(clean)]
    for name, color in keys:
        x, y = clean[name]
        if name in (bands or {}):
            axes.fill_between(x, *bands[name], color=color, alpha=0.16, linewidth=0)
        if smooth > 1:
            axes.plot(x, y, color=color, linewidth=1, alpha=0.3)
            y = moving_average(y, smooth)
        axes.plot(x, y, color=color, linewidth=2.2, marker="o" if len(x) <= 12 else "")
    if reference:
        level, label = reference
        axes.axhline(level, color=FAINT, linewidth=1.2, dashes=(4, 4))
        place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
        over = axes.get_yaxis_transform()
        axes.annotate(label, (1, level), xycoords=over, color=FAINT, fontsize=10.5, **place)
    _letter(axes.yaxis, of_axis(column))
    if x_labels:
        shown = range(0, len(x_labels), math.ceil(len(x_labels) / 6))
        axes.set_xticks(shown, [x_labels[i] for i in shown])
        axes.set_xlim(-0.25, len(x_labels) - 0.75)
    else:
        _letter(axes.xaxis, plain)
    axes.set_xlabel(x_label)
    return _chart(title, keys if len(keys) > 1 else (), axes, bottom=38 if x_label else 22)


@matplotlib.rc_context(STYLE)
def histogram(
    title: str,
    groups: Mapping[str, Sequence[float]],
    column: Column = PLAIN,
    *,
    bins: int = 12,
    colors: Sequence[str] = COLORS,
    outlined: Sequence[str] = (),
) -> Chart | None:
    """Shares of each group's values in common bins; the legend has their means; None without any.

    Bars stand side by side; the groups that `outlined` names are lines over them.
    """
    groups = {name: np.asarray(values, np.float64) for name, values in groups.items()}
    groups = {name: values[np.isfinite(values)] for name, values in groups.items()}
    groups = {name: values for name, values in groups.items() if values.size}
    if not groups:
        return None
    low, high = (edge(np.concatenate([*groups.values()])) for edge in (np.min, np.max))
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    axes = _axes()
    ticks = axes.xaxis.get_major_locator().tick_values(low, high)
    edges = np.linspace(ticks[0], ticks[-1], bins + 1)
    barred = [name for name in groups if name not in outlined]
    width = 0.9 * (edges[1] - edges[0]) / max(len(barred), 1)
    keys = []
    for (name, values), color in zip(groups.items(), colors, strict=False):
        shares = np.histogram(values, edges)[0] / values.size
        keys.append((f"{name}: mean {number(column, values.mean())}", color))
        if name in outlined:
            axes.stairs(shares, edges, color=color, linewidth=2)
        else:
            shown = shares > 0
            left = edges[:-1] + width * (0.055 + barred.index(name))
            axes.bar(left[shown], shares[shown], width, align="edge", color=color)
    axes.set_xticks(ticks)
    axes.set_xlim(ticks[0], ticks[-1])
    _letter(axes.xaxis, of_axis(column))
    _letter(axes.yaxis, percent)
    return _chart(title, keys, axes)


@matplotlib.rc_context(STYLE)
def bars(
    title: str,
    labels: Sequence[str],
    groups: Mapping[str, Sequence[int]],
    *,
    colors: Sequence[str] = COLORS[1:],
) -> Chart | None:
    """Counts, {name: one a label}: bars side by side, a number on each that has the room."""
    if not labels:
        return None
    axes = _axes()
    pitch = (WIDTH - 50) / len(labels)  # units, as a font's size is
    width = min(0.8 / len(groups), 34 / pitch)
    keys = [*zip(groups, colors, strict=False)]
    for j, (name, color) in enumerate(keys):
        middles = np.arange(len(labels)) + (j - len(groups) / 2 + 0.5) * width
        drawn = axes.bar(middles, groups[name], 0.95 * width, color=color)
        texts = [f"{count:,}" for count in groups[name]]
        texts = [text if 6.4 * len(text) <= width * pitch else "" for text in texts]
        axes.bar_label(drawn, texts, color=INK, fontsize=10)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    _letter(axes.yaxis, plain)
    return _chart(title, keys, axes, top=16)


@matplotlib.rc_context(STYLE)
def dots(
    title: str,
    rows: Mapping[str, Mapping[str, Mapping[str, float]]],
    column: Column,
) -> Chart | None:
    """Means with intervals on one scale, {label: {name: interval}}, each with its numbers.

    None without any.
    """
    rows = {label: points for label, points in rows.items() if points}
    if not rows:
        return None
    names = list(dict.fromkeys(name for points in rows.values() for name in points))
    colors = dict(zip(names, COLORS, strict=False))
    pitch = 38
    axes = _axes(pitch * len(rows) + 26, grid="x")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, (label, points) in enumerate(rows.items()):
        middle = i + 0.72  # the words above it
        numbers = " → ".join(number(column, point["mean"]) for point in points.values())
        for x, text, align in ((0, label, "left"), (1, numbers, "right")):
            place = {"transform": axes.get_yaxis_transform(), "ha": align, "va": "center"}
            axes.text(x, i + 0.28, text, color=INK, bbox=behind, **place)
        for j, (name, point) in enumerate(points.items()):
            y = middle + 0.1 * (2 * j - len(points) + 1)
            axes.hlines(y, point["low"], point["high"], color=colors[name], linewidth=2)
            axes.plot(point["mean"], y, "o", color=colors[name], markersize=8)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])
    _letter(axes.xaxis, of_axis(column))
    keys = [*colors.items()] if len(names) > 1 else ()
    return _chart(title, keys, axes, top=2, left=16)
