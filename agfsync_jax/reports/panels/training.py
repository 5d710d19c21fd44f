"""Loss, margin and accuracy over the steps, a line a round."""

import math

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report

LEVELS = {
    "loss": (math.log(2), "ln 2: no preference yet"),
    "rewards/margin": (0.0, "no preference"),
    "rewards/accuracy": (0.5, "chance"),
}


def show(report: Report) -> dict:
    curves = {each.label: each.curve for each in report.rounds if each.curve}
    if not curves:
        return {}
    preferring = any("rewards/margin" in curve[0] for curve in curves.values())
    shown = [
        chart(
            name,
            {label: line(curve, name) for label, curve in curves.items()},
            column=formats.SHARE if name == "rewards/accuracy" else charts.PLAIN,
            reference=level if preferring or name != "loss" else None,
        )
        for name, level in LEVELS.items()
    ]
    label, curve = list(curves.items())[-1]
    sides = {name: line(curve, name) for name in ("rewards/chosen", "rewards/rejected")}
    shown.append(chart(f"rewards, {label}", sides))
    return {
        "charts": shown,
        "note": "Pale: every logged step; bold: the moving average. Accuracy is the share of pairs "
        "whose chosen image the policy prefers more than the reference does. A reward below 0: the "
        "policy finds that image less likely than the reference does.",
    }


def line(curve: list[dict], name: str) -> tuple[list, list]:
    """Steps and values of a metric, of the rows that have it."""
    rows = [row for row in curve if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def chart(title: str, series: dict, **settings) -> charts.Chart | None:
    """Lines over the steps, smoothed where they are long."""
    longest = max(len(steps) for steps, _ in series.values())
    smooth = max(1, longest // 20)
    return charts.lines(title, series, x_label="step", smooth=smooth, **settings)


PANEL = Panel("report", 90, show, "Training")
