"""How numbers are written: a column's in the column's format, shares, counts, times."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from agfsync_jax.data.columns import Column
from agfsync_jax.utils import statistics

SHARE, TOTAL = Column(format="%"), Column(format=".3g")  # a total is a weighted sum of scores


class Figure(NamedTuple):
    """A number as text, with the ends of its interval, and what it says: better, worse or ""."""

    text: str
    ends: str = ""
    says: str = ""
    arrow: str = ""


def describe(names: Iterable[str], columns: Mapping[str, Column]) -> dict[str, Column]:
    """Column of each name: those that are known in their order, then the others by name."""
    names = set(names)
    known = {name: column for name, column in columns.items() if name in names}
    return known | {name: Column() for name in sorted(names - known.keys())}


def with_digits(column: Column, delta: Mapping[str, float]) -> Column:
    """The column, with as many decimals more as an interval of its differences needs to be seen."""
    match = re.fullmatch(r"(?:\.(\d+))?([f%])", column.format)
    if not match:
        return column
    digits, kind = int(match[1] or 1), match[2]
    shift = 2 if kind == "%" else 0
    return column._replace(format=f".{statistics.digits(delta, digits + shift) - shift}{kind}")


def number(column: Column, value: float, *, signed: bool = False) -> str:
    """A value as text: "81.4%"; `signed` a difference: "+1.6 pt" for shares."""
    sign = "+" if signed else ""
    if column.format.endswith("%"):
        digits = column.format[:-1] or ".1"
        text = "100" if value == 1 and not signed else f"{100 * value:{sign}{digits}f}"
        text += " pt" if signed else "%"
    else:
        text = f"{value:{sign}{column.format}}"
    return text.replace("-", "−")


def between(column: Column, interval: Mapping[str, float], *, signed: bool = False) -> str:
    """The ends of an interval: "80.6 – 82.3", signed: "+0.6 to +2.6"."""
    low, high = (number(column, interval[end], signed=signed) for end in ("low", "high"))
    unit = " pt" if signed else "%"
    return f"{low.removesuffix(unit)} {'to' if signed else '–'} {high.removesuffix(unit)}"


def direction(column: Column, interval: Mapping[str, float], zero: float = 0.0) -> str:
    """ "better" or "worse" where the 95% interval leaves out `zero`, else ""."""
    if interval["low"] <= zero <= interval["high"]:
        return ""
    return "better" if (interval["low"] > zero) == column.higher_is_better else "worse"


def value(column: Column, interval: Mapping[str, float]) -> Figure:
    """A mean and its interval."""
    return Figure(number(column, interval["mean"]), between(column, interval))


def change(column: Column, interval: Mapping[str, float]) -> Figure:
    """A mean difference and its interval; the arrow says whether the number rises or falls."""
    says = direction(column, interval)
    arrow = ("▲" if interval["low"] > 0 else "▼") if says else ""
    text = number(column, interval["mean"], signed=True)
    return Figure(text, between(column, interval, signed=True), says, arrow)


def win_rate(column: Column, interval: Mapping[str, float]) -> Figure:
    """How often the tuned image has the better number.

    Args:
        interval: of how often it has the higher one.
    """
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if not column.higher_is_better:
        mean, low, high = 1 - mean, 1 - high, 1 - low
    interval = {"low": low, "high": high}
    says = direction(SHARE, interval, 0.5)
    arrow = {"better": "▲", "worse": "▼", "": ""}[says]
    return Figure(percent(round(mean, 3)), between(SHARE, interval), says, arrow)


def plain(value: float) -> str:
    """A number on an axis: short."""
    size = abs(value)
    text = f"{value:.1e}" if size and (size < 1e-3 or size >= 1e6) else f"{value:,.6g}"
    return text.replace("-", "−")


def of_axis(column: Column) -> Callable[[float], str]:
    """How an axis of its values is lettered."""
    return percent if column.format.endswith("%") else plain


def percent(share: float) -> str:
    """ "62.5%"."""
    return f"{100 * share:.4g}%".replace("-", "−")


def whole_percent(share: float) -> str:
    """ "62%"."""
    return percent(round(share, 2))


def count(number: int, word: str) -> str:
    """ "1 pair", "1,200 pairs"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """ "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
