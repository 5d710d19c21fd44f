"""Accuracy by kind of question, and by the parts of scores that have some, base against tuned."""

from collections import defaultdict

import numpy as np

from agfsync_jax.data.columns import Column
from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report
from agfsync_jax.utils.statistics import bootstrap


def show(report: Report) -> dict:
    # {title: {kind: {model: [(value, prompt)]}}}
    tables = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for model, answers in report.last.answers.items():
        for row in answers:
            kinds = tables[f"{row['scorer']}: answers right"]
            kinds[row["element_type"]][model].append((float(row["correct"]), row["prompt_id"]))
    columns = {title: formats.SHARE for title in tables} | report.columns
    for model, rows in report.last.rows.items():
        for row in rows:
            for name, value in row.items():
                whole, _, part = name.partition("/")
                if part and whole in row and value is not None and np.isfinite(value):
                    tables[whole][part][model].append((value, row["prompt_id"]))
    shown = []
    for title, kinds in tables.items():
        points = {
            kind: {model: _interval(pairs) for model, pairs in kinds[kind].items()}
            for kind in sorted(kinds)
        }
        shown.append(charts.dots(title, points, columns.get(title, Column())))
    note = "Base → tuned on the held-out prompts; bars are 95% intervals."
    return {"charts": shown, "note": note} if shown else {}


def _interval(pairs: list[tuple[float, str]]) -> dict[str, float]:
    values, prompts = zip(*pairs, strict=True)
    return bootstrap(values, np.array(prompts))


PANEL = Panel("report", 60, show, "What it gets right")
