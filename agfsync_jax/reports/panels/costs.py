"""Seconds, items and rate of every stage, a table a round."""

from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    tables = {each.label: _rows(each.stages) for each in report.rounds if each.stages}
    return {"tables": tables} if tables else {}


def _rows(stages: dict) -> list[dict]:
    total = sum(stage["seconds"] for stage in stages.values())
    return [
        {
            "verb": verb,
            "seconds": stage["seconds"],
            "share": stage["seconds"] / (total or 1.0),
            "items": stage["items"],
            "rate": _rate(stage["items_per_second"]) if stage["items"] else "–",
        }
        for verb, stage in stages.items()
    ]


def _rate(speed: float) -> str:
    return f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s"


PANEL = Panel(
    "report",
    110,
    show,
    "What it cost",
    """
<div class="cards">
{% for label, rows in tables.items() %}
<div class="card"><h3>{{ label }}</h3>
<table>{{ m.header(["Stage", "Time", "Items", "Rate"]) }}<tbody>
{% for row in rows %}
<tr><td>{{ row.verb }}{{ m.bar(row.share) }}</td><td>{{ row.seconds|duration }}</td>
<td>{{ "{:,}".format(row["items"]) }}</td><td>{{ row.rate }}</td></tr>
{% endfor %}
<tr><td><b>all</b></td><td><b>{{ rows|sum(attribute="seconds")|duration }}</b></td>
<td></td><td></td></tr>
</tbody></table></div>
{% endfor %}
</div>
""",
)
