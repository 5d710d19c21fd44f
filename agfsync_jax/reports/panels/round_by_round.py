"""Each score from the base through every round."""

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.formats import Figure
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    judged = report.judged
    if len(judged) < 2:
        return {}
    base = judged[0].base
    states = {"base": base} | {each.label: each.tuned for each in judged}
    curves, rows = [], []
    for name, column in report.columns.items():
        if not all(name in values for values in states.values()):
            continue
        mean, low, high = (
            [values[name][key] for values in states.values()] for key in ("mean", "low", "high")
        )
        curves.append(
            charts.lines(
                name,
                {name: (range(len(states)), mean)},
                bands={name: (low, high)},
                x_labels=list(states),
                column=column,
            )
        )
        rows.append((name, "", [formats.change(column, each.delta[name]) for each in judged]))
    rows.append(("pairs", "", [Figure(f"{each.counts.get('pairs', '–')}") for each in judged]))
    return {
        "labels": [each.label for each in judged],
        "rows": rows,
        "charts": curves,
        "note": "Each round draws, scores and trains anew, starting from the last policy. Changes "
        "are from the base; bands are 95% intervals.",
    }


TEMPLATE = """
<div class="card scroll">{{ m.figures(labels, rows, css="") }}</div>
{{ m.cards(charts) }}
"""
PANEL = Panel("report", 40, show, "Round by round", TEMPLATE)
