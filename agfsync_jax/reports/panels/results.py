"""The table of all scores: values, change and win rate, each over its 95% interval."""

from agfsync_jax.reports import formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    last = report.last
    images = last.rows["tuned"]
    rows = [
        (
            name,
            column.about,
            (
                formats.value(column, last.base[name]),
                formats.value(column, last.tuned[name]),
                formats.change(column, last.delta[name]),
                formats.win_rate(column, last.win_rate[name]),
            ),
        )
        for name, column in report.columns.items()
        if name in last.delta
    ]
    prompts = len({row["prompt_id"] for row in images})
    # Of people's pairs nobody knows what prompts they are of.
    kind = "prompts that training never saw" if last.draws else "held-out prompts"
    found = {"rows": rows, "prompts": f"{prompts} {kind}", "images": len(images)}
    return found if rows else {}


TEMPLATE = """
<div class="card">{{ m.figures(["Base", "Tuned", "Change", "Win rate"], rows) }}</div>
<p class="note">{{ prompts }}, {{ images }} images a model, the
same seeds for both. Small figures are 95% intervals from a paired bootstrap over prompts; what is
better is green and what is worse red, where they exclude no change. Win rate: how often the tuned
image beats the base image of its prompt and seed, a tie counting half.</p>
"""
PANEL = Panel("report", 20, show, template=TEMPLATE)
