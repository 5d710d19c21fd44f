"""The config as JSON, folded, and the versions of what ran."""

from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    versions = [f"{name} {version}" for name, version in report.versions.items()]
    return {"settings": report.settings, "versions": versions}


TEMPLATE = """
{% if settings %}
<details><summary>The whole config</summary><pre>{{ settings }}</pre></details>
{% endif %}
<p class="note">{{ versions|join(" · ") }}</p>
"""
PANEL = Panel("report", 120, show, "Setting", TEMPLATE)
