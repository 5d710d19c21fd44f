"""SVG charts, as strings that stand in a page by themselves.

Charts are 360 units wide, so that their lettering keeps its size on a phone; a page sets as many
side by side as fit. All text that came from outside is escaped.
"""

import html
import math

import numpy as np

COLORS = ("#8b95a5", "#2457d6", "#d9730d", "#0f8a6d", "#8a3ffc", "#c2255c")  # the first is the base
INK, FAINT, GRID = "#1c2330", "#667085", "#e6e9ef"
WIDTH = 360


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high]."""
    if high <= low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick label: short, with a true minus sign."""
    size = abs(value)
    text = f"{value:.1e}" if size and (size < 1e-3 or size >= 1e6) else f"{value:,.6g}"
    return text.replace("-", "−")


def percent(value: float) -> str:
    return f"{100 * value:.4g}%".replace("-", "−")


def _text(x, y, text, *, anchor="middle", size=11, fill=FAINT, bold=False) -> str:
    weight = ' font-weight="700"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" '
        f'text-anchor="{anchor}"{weight}>{html.escape(str(text))}</text>'
    )


def _line(x1, y1, x2, y2, color=GRID, width=1.0, dash="") -> str:
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{color}" stroke-width="{width}"{dash}/>'
    )


def _svg(title: str, height: float, parts, legend=()) -> str:
    x, keys = 2.0, []
    for name, color in legend:
        keys.append(f'<rect x="{x:.1f}" y="27" width="11" height="11" rx="3" fill="{color}"/>')
        keys.append(_text(x + 16, 36.5, name, anchor="start"))
        x += 30 + 6.2 * len(str(name))
    label = html.escape(str(title))
    heading = _text(2, 14, title, anchor="start", size=13.5, fill=INK, bold=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}" '
        f'font-family="inherit">{heading}{"".join(keys)}{"".join(parts)}</svg>'
    )


def _axes(x_ticks, y_ticks, x_label, x_format, y_format, top, bottom):
    """Grid, labels and the two maps from data to the drawing; left margin follows the labels."""
    labels = [y_format(t) for t in y_ticks]
    left = 10 + 6.4 * max(len(label) for label in labels)
    right = WIDTH - 12

    def to_x(value):
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    def to_y(value):
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    parts = []
    for tick, label in zip(y_ticks, labels, strict=True):
        parts += [_line(left, to_y(tick), right, to_y(tick))]
        parts += [_text(left - 6, to_y(tick) + 4, label, anchor="end")]
    for tick in x_ticks:
        anchor = "end" if tick == x_ticks[-1] else "middle"
        shift = 8 if anchor == "end" else 0
        parts += [_text(to_x(tick) + shift, bottom + 16, x_format(tick), anchor=anchor)]
    if x_label:
        parts.append(_text((left + right) / 2, bottom + 33, x_label))
    return parts, to_x, to_y


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centered mean over `window` values, over fewer at the ends."""
    window = max(1, min(window, len(values)))
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def line_chart(
    title: str,
    series: dict,
    *,
    bands: dict | None = None,
    x_label: str = "",
    x_labels: list[str] | None = None,
    y_format=number,
    reference: tuple[float, str] | None = None,
    smooth: int = 1,
    colors=COLORS[1:],
) -> str:
    """Lines over x, series = {name: (x, y)}; values that are not finite are left out.

    bands {name: (low, high)} are shaded, smooth > 1 draws the raw line pale under its moving
    average, reference is a dashed level with its name, x_labels name the positions 0, 1, 2, ...
    """
    clean = {}
    for name, (xs, ys) in series.items():
        xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        keep = np.isfinite(ys)
        if keep.any():
            clean[name] = (xs[keep], ys[keep])
    if not clean:
        return ""
    all_x = np.concatenate([x for x, _ in clean.values()])
    spread = [y for _, y in clean.values()]
    spread += [np.asarray(edge, np.float64) for band in (bands or {}).values() for edge in band]
    spread = np.concatenate(spread + ([np.array([reference[0]])] if reference else []))
    y_ticks = ticks(float(spread.min()), float(spread.max()))
    if x_labels:
        x_ticks = list(range(len(x_labels)))
    else:
        x_ticks = ticks(float(all_x.min()), float(all_x.max()))
    height = 226 if x_label else 210
    top, bottom = 50 if len(clean) > 1 else 34, height - (40 if x_label else 24)
    parts, to_x, to_y = _axes(
        x_ticks,
        y_ticks,
        x_label,
        lambda t: x_labels[t] if x_labels else number(t),
        y_format,
        top,
        bottom,
    )
    if reference:
        level, label = reference
        parts.append(
            _line(to_x(x_ticks[0]), to_y(level), WIDTH - 12, to_y(level), FAINT, 1.2, "4 4")
        )
        parts.append(_text(WIDTH - 12, to_y(level) - 5, label, anchor="end", size=10.5))
    legend = []
    for (name, (xs, ys)), color in zip(clean.items(), _cycle(colors, len(clean)), strict=True):
        legend.append((name, color))
        if bands and name in bands:
            low, high = bands[name]
            edge = [*zip(xs, high, strict=True), *reversed([*zip(xs, low, strict=True)])]
            points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in edge)
            parts.append(f'<polygon points="{points}" fill="{color}" opacity="0.16"/>')
        if smooth > 1:
            parts.append(_path(xs, ys, to_x, to_y, color, 1, 0.3))
            ys = moving_average(ys, smooth)
        parts.append(_path(xs, ys, to_x, to_y, color, 2.2, 1))
        if len(xs) <= 12:
            parts += [
                f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3.4" fill="{color}"/>'
                for x, y in zip(xs, ys, strict=True)
            ]
    return _svg(title, height, parts, legend if len(legend) > 1 else ())


def _cycle(colors, count: int):
    return [colors[i % len(colors)] for i in range(count)]


def _path(xs, ys, to_x, to_y, color, width, opacity) -> str:
    points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in zip(xs, ys, strict=True))
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'opacity="{opacity}" stroke-linejoin="round"/>'
    )


def histogram(
    title: str,
    groups: dict,
    *,
    bins: int = 12,
    x_format=number,
    mean_format=number,
    colors=COLORS,
    outlined=(),
) -> str:
    """Shares of each group's values in common bins, with their means.

    Bars stand side by side; the groups that `outlined` names are lines over them, and the mean is
    then a bare number in the legend, as there are more names.
    """
    groups = {name: np.asarray(v, np.float64) for name, v in groups.items()}
    groups = {name: v[np.isfinite(v)] for name, v in groups.items()}
    groups = {name: v for name, v in groups.items() if v.size}
    if not groups:
        return ""
    values = np.concatenate(list(groups.values()))
    x_ticks = ticks(float(values.min()), float(values.max()))
    edges = np.linspace(x_ticks[0], x_ticks[-1], bins + 1)
    shares = {name: np.histogram(v, edges)[0] / v.size for name, v in groups.items()}
    y_ticks = ticks(0.0, float(max(s.max() for s in shares.values())), 3)
    height, top, bottom = 210, 54, 186
    parts, to_x, to_y = _axes(x_ticks, y_ticks, "", x_format, percent, top, bottom)
    legend, barred = [], [name for name in groups if name not in outlined]
    for i, (name, share) in enumerate(shares.items()):
        color = colors[i % len(colors)]
        mean = mean_format(groups[name].mean())
        legend.append((f"{name} {mean}" if outlined else f"{name} (mean {mean})", color))
        if name in outlined:
            heights = [0.0, *np.repeat(share, 2), 0.0]
            parts.append(_path(np.repeat(edges, 2), heights, to_x, to_y, color, 2, 1))
            continue
        for left, right, value in zip(edges[:-1], edges[1:], share, strict=True):
            x0, x1 = to_x(left) + 1, to_x(right) - 1
            width, place = (x1 - x0) / len(barred), barred.index(name)
            if value:
                parts.append(
                    f'<rect x="{x0 + place * width:.1f}" y="{to_y(value):.1f}" '
                    f'width="{width:.1f}" height="{bottom - to_y(value):.1f}" fill="{color}"/>'
                )
    return _svg(title, height, parts, legend)


def bar_chart(title: str, labels: list[str], groups: dict, *, colors=COLORS[1:]) -> str:
    """Counts, groups = {name: one count a label}: bars side by side, a number on each."""
    if not labels:
        return ""
    y_ticks = ticks(0.0, float(max(max(counts) for counts in groups.values())), 3)
    height, top, bottom = 210, 60, 186
    parts, _, to_y = _axes([0, 1], y_ticks, "", lambda tick: "", number, top, bottom)
    left = 10 + 6.4 * max(len(number(tick)) for tick in y_ticks)
    pitch = (WIDTH - 12 - left) / len(labels)
    width = min(0.8 * pitch / len(groups), 34)
    for i, label in enumerate(labels):
        middle = left + (i + 0.5) * pitch
        parts.append(_text(middle, bottom + 16, label))
        for j, (counts, color) in enumerate(zip(groups.values(), colors, strict=False)):
            x, y = middle + (j - len(groups) / 2) * width, to_y(counts[i])
            parts.append(
                f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{bottom - y:.1f}" fill="{color}"/>'
            )
            text = f"{counts[i]:,}"
            if 5.6 * len(text) <= width:  # a number wider than its bar would run into the next
                parts.append(_text(x + width / 2, y - 4, text, size=10, fill=INK))
    return _svg(title, height, parts, [*zip(groups, colors, strict=False)])


def share_chart(title: str, rows: list, *, colors=COLORS[1:]) -> str:
    """Shares that add up to one as parts of a bar, rows = [(label, {name: share})]."""
    if not rows:
        return ""
    pitch, top, left, right = 40, 46, 2, WIDTH - 2
    names, middle, bottom = list(rows[0][1]), (left + right) / 2, top + pitch * len(rows)
    parts = [_line(middle, top + 14, middle, bottom - 5, FAINT, 1, "2 2")]  # shows between bars
    for i, (label, shares) in enumerate(rows):
        y, x = top + pitch * i, float(left)
        parts.append(_text(left, y + 12, label, anchor="start", size=11.5, fill=INK))
        for name, color in zip(names, colors, strict=False):
            width = shares[name] * (right - left)
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 18:.1f}" width="{width:.1f}" height="15" '
                f'fill="{color}"/>'
            )
            text = percent(round(shares[name], 2))
            if width > 8 + 6 * len(text):
                parts.append(
                    _text(x + width / 2, y + 29.5, text, size=10.5, fill="#fff", bold=True)
                )
            x += width
    return _svg(title, bottom, parts, [*zip(names, colors, strict=False)])


def dot_chart(
    title: str, rows: list, *, x_format=percent, value_format=percent, colors=COLORS
) -> str:
    """Means with intervals on one scale: rows = [(label, {name: (mean, low, high)})].

    A thin line joins the points of a row; the numbers stand beside the label.
    """
    rows = [(label, points) for label, points in rows if points]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for _, points in rows for name in points))
    every = [v for _, points in rows for p in points.values() for v in p if math.isfinite(v)]
    x_ticks = ticks(min(every), max(every))
    pitch, top = 38, 48 if len(names) > 1 else 26
    bottom = top + pitch * len(rows)
    left, right = 12, WIDTH - 14

    def to_x(value):
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    parts = [_line(to_x(t), top + 4, to_x(t), bottom) for t in x_ticks]
    for tick in x_ticks:
        anchor = {x_ticks[0]: "start", x_ticks[-1]: "end"}.get(tick, "middle")
        shift = {"start": -10, "end": 12}.get(anchor, 0)
        parts.append(_text(to_x(tick) + shift, bottom + 16, x_format(tick), anchor=anchor))
    for i, (label, points) in enumerate(rows):
        y = top + pitch * i + 28
        # A white edge keeps the lettering clear of the grid lines behind it.
        numbers = " → ".join(value_format(p[0]) for p in points.values())
        for text in (
            _text(left, y - 11, label, anchor="start", size=11.5, fill=INK),
            _text(right, y - 11, numbers, anchor="end", size=11.5, fill=INK),
        ):
            parts.append(
                text.replace("<text ", '<text stroke="#fff" stroke-width="4" paint-order="stroke" ')
            )
        centers = [to_x(p[0]) for p in points.values()]
        parts.append(_line(min(centers), y, max(centers), y, "#c9d0db", 1.5))
        for j, name in enumerate(n for n in names if n in points):
            mean, low, high = points[name]
            color = colors[names.index(name) % len(colors)] if len(names) > 1 else colors[1]
            offset = y + (3.5 * (2 * j - len(points) + 1) / 2 if len(points) > 1 else 0)
            parts.append(_line(to_x(low), offset, to_x(high), offset, color, 2))
            parts.append(
                f'<circle cx="{to_x(mean):.1f}" cy="{offset:.1f}" r="4.6" fill="{color}"/>'
            )
    legend = [(name, colors[i % len(colors)]) for i, name in enumerate(names)]
    return _svg(title, bottom + 24, parts, legend if len(names) > 1 else ())
