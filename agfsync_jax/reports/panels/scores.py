"""A histogram a score, before and after; a share of yes or no alone says nothing here."""

from agfsync_jax.data.columns import KEYS, without_parts
from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    rows = report.last.rows
    names = without_parts({name for row in rows["base"] for name in row} - {*KEYS})
    shown = [
        charts.histogram(
            name,
            {model: [row[name] for row in rows[model] if name in row] for model in rows},
            column=column,
        )
        for name, column in formats.describe(names, report.columns).items()
        if name not in report.yes_or_no
    ]
    note = "Share of the held-out images at each score."
    return {"charts": shown, "note": note} if any(shown) else {}


PANEL = Panel("report", 80, show, "Scores before and after")
