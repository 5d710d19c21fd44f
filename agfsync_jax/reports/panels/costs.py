"""Seconds, items and rate of every stage, a table a round."""

from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    tables = {each.label: each.stages for each in report.rounds if each.stages}
    return {"tables": tables, "rate": _rate} if tables else {}


def _rate(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s"


TEMPLATE = """
<div class="cards">
{% for label, stages in tables.items() %}
{% set total = stages.values()|sum(attribute="seconds") %}
<div class="card"><h3>{{ label }}</h3>
<table>{{ m.header(["Stage", "Time", "Items", "Rate"]) }}<tbody>
{% for verb, stage in stages.items() %}
<tr><td>{{ verb }}{{ m.bar(stage.seconds / (total or 1)) }}</td>
<td>{{ stage.seconds|duration }}</td><td>{{ "{:,}".format(stage["items"]) }}</td>
<td>{{ rate(stage.items_per_second) if stage["items"] else "–" }}</td></tr>
{% endfor %}
<tr><td><b>all</b></td><td><b>{{ total|duration }}</b></td>
<td></td><td></td></tr>
</tbody></table></div>
{% endfor %}
</div>
"""
PANEL = Panel("report", 110, show, "What it cost", TEMPLATE)
