"""What a card of a page shows: pictures of one prompt, their scores, the answers about them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agfsync_jax.data.columns import KEYS, without_parts
from agfsync_jax.reports import formats
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.rounds import Report

IMAGES = ("first image", "second image")  # candidates 0 and 1 of an imported row


class Side(NamedTuple):
    """A picture: its name, of which the first word gives the color, and lines below it, each
    (what, a number, "better" or "")."""

    name: str
    png: bytes | None
    lines: Sequence[tuple[str, str, str]]


class Card(NamedTuple):
    """Pictures of one prompt, `size` pixels large at most; `answers` are pairs of rows."""

    prompt: str
    sides: Sequence[Side]
    answers: Sequence[tuple[dict, dict]]
    table: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()  # rows of a ranking's scores
    columns: Sequence[str] = ()
    margin: str = ""
    size: int = 512


def of_models(report: Report, example: Mapping) -> Card:
    """Base beside tuned."""
    sides = []
    for name in ("base", "tuned"):
        scores, answers = example[name]["scores"], example[name]["answers"]
        right = [bool(row["correct"]) for row in answers]
        lines = [("answers", f"{sum(right)}/{len(right)}", "")] if right else []
        # A scorer that asks tells no more than its answers do.
        left_out = {row["scorer"] for row in answers} | report.yes_or_no
        columns = formats.describe(without_parts(scores.keys() - {*KEYS}), report.columns)
        lines += [
            (name, formats.number(column, scores[name]), "")
            for name, column in columns.items()
            if name not in left_out
        ]
        sides.append(Side(name, example[name]["png"], lines))
    answers = _by_difference(example["base"]["answers"], example["tuned"]["answers"])
    return Card(example["prompt"], sides, answers)


def of_pair(gallery: Gallery, example: Mapping) -> Card:
    """Chosen beside rejected; or a ranking, best first, whose scores stand in a table."""
    found, names = example["sides"], list(gallery.columns)
    sides, table = [], []
    for place, each in enumerate(found):
        title = {0: gallery.sides[0], len(found) - 1: gallery.sides[1]}.get(place, str(place + 1))
        number = each["candidate"]
        lines = [(IMAGES[number], "", "") if gallery.is_import else ("candidate", f"{number}", "")]
        marks = [_mark(gallery, name, each, found) for name in names]
        total = formats.number(formats.TOTAL, each["total"])
        if gallery.is_ranked:
            table.append((title, [*marks, (total, "")]))
        elif not gallery.is_import:
            lines += [(name, *mark) for name, mark in zip(names, marks, strict=True)]
            lines.append(("total", total, ""))
        sides.append(Side(title, each["png"], lines))
    first, last = found[0]["answers"], found[-1]["answers"]
    if len(gallery.answers) > 1:
        first, last = (
            [row | {"question": f"{row['scorer']}: {row['question']}"} for row in rows]
            for rows in (first, last)
        )
    return Card(
        example["prompt"],
        sides,
        _by_difference(first, last),
        table,
        ["place", *names, "total"],
        "" if gallery.is_import else f"margin {formats.number(formats.TOTAL, example['margin'])}",
        256 if gallery.is_ranked else 512,
    )


def _mark(gallery: Gallery, name: str, side: Mapping, sides: Sequence[Mapping]) -> tuple[str, str]:
    """A score as text, and "better" where it is the best of several."""
    value = side["scores"].get(name, np.nan)
    if np.isnan(value):
        return "–", ""
    sign = gallery.signs[name]
    values = [sign * each["scores"].get(name, np.nan) for each in sides]
    is_best = sign * value == np.nanmax(values) > np.nanmin(values)
    return formats.number(gallery.columns[name], value), "better" if is_best else ""


def _by_difference(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Answers to the same questions about two images: where they differ first, then wrong ones."""

    def rank(both: tuple[dict, dict]) -> tuple[bool, bool]:
        one, other = (bool(row["correct"]) for row in both)
        return one == other, other

    return sorted(zip(first, second, strict=True), key=rank)
