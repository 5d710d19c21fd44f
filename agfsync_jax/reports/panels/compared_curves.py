"""Learning curves of all runs: scores of validations, then loss, margin and accuracy."""

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.panels import Panel, training
from agfsync_jax.reports.runs import Comparison


def show(comparison: Comparison) -> dict:
    curves = {run.label: run.curve for run in comparison.runs if run.curve}
    names = dict.fromkeys(name for curve in curves.values() for row in curve for name in row)
    shown = []
    for name in [name for name in names if name.startswith("validation/")]:
        column = comparison.columns.get(name.removeprefix("validation/"), charts.PLAIN)
        series = {label: training.line(curve, name) for label, curve in curves.items()}
        shown.append(charts.lines(name, series, x_label="step", column=column))
    for name, level in training.LEVELS.items():
        if name in names:
            one_loss = "loss.name" not in comparison.reference.differs
            shown.append(
                training.chart(
                    name,
                    {label: training.line(curve, name) for label, curve in curves.items()},
                    column=formats.SHARE if name == "rewards/accuracy" else charts.PLAIN,
                    reference=level if name != "loss" or one_loss else None,
                )
            )
    return {"charts": shown} if shown else {}


PANEL = Panel("compare", 20, show, "Training")
