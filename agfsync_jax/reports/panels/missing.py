"""What a workdir does not hold yet."""

from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    rounds = [each for each in report.rounds if each.missing]
    return {"rounds": rounds} if rounds else {}


TEMPLATE = """
<div class="card"><b>Not there yet</b><ul>
{% for each in rounds %}<li>{{ each.label }}: {{ each.missing|join(", ") }}</li>{% endfor %}
</ul></div>
"""
PANEL = Panel("report", 30, show, template=TEMPLATE)
