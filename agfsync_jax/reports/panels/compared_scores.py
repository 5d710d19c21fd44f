"""A table a score: every run's tuned model, against its base and against the reference."""

from agfsync_jax.reports import formats
from agfsync_jax.reports.formats import Figure
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.runs import Comparison


def show(comparison: Comparison) -> dict:
    nothing, tables = Figure("–"), []
    for name, column in comparison.columns.items():
        rows = []
        for run in comparison.runs:
            last = run.last
            if name not in last.delta:
                continue
            against = formats.change(column, run.against[name]) if name in run.against else nothing
            if run is comparison.reference:
                against = Figure("reference")
            figures = (
                formats.value(column, last.tuned[name]),
                formats.change(column, last.delta[name]),
                formats.win_rate(column, last.win_rate[name]),
                against,
            )
            rows.append((run.label, str(run.folder), figures))
        for group in comparison.groups:
            if name in group.tuned:
                ends = formats.between(column, group.delta[name], signed=True)
                mean = formats.number(column, group.delta[name]["mean"], signed=True)
                figures = (formats.value(column, group.tuned[name]), Figure(mean, ends))
                rows.append((group.label, "mean, lowest and highest", (*figures, nothing, nothing)))
        tables.append((name, column.about, rows))
    unpaired = [(run.label, run.unpaired) for run in comparison.runs if run.unpaired]
    return {
        "names": ("Tuned", "Change", "Win rate", "To reference"),
        "tables": tables,
        "unpaired": unpaired,
        "reference": comparison.reference.label,
    }


TEMPLATE = """
{% for name, about, rows in tables %}
<h3>{{ name }}{% if about %} <span class="faint">– {{ about }}</span>{% endif %}</h3>
<div class="card scroll">{{ m.figures(names, rows) }}</div>
{% endfor %}
{% if unpaired %}
<div class="card"><b>Not compared with the reference image by image</b><ul>
{% for label, why in unpaired %}<li>{{ label }}: {{ why }}</li>{% endfor %}
</ul></div>
{% endif %}
<p class="note">Change: tuned less base. To reference: tuned less the tuned of {{ reference }}, on
the same prompts and seeds. Small figures are 95% intervals from a bootstrap over prompts, paired
for differences; what is better is green and what is worse red, where they exclude no change. Win
rate: how often the tuned image beats the base image of its prompt and seed, a tie counting half.
An interval knows nothing of what another training seed would have given: what several seeds gave
stands below their runs.</p>
"""
PANEL = Panel("compare", 10, show, template=TEMPLATE)
