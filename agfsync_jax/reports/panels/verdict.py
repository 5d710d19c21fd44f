"""Whether the tuned model is better, in words."""

from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report
from agfsync_jax.reports.verdict import verdict


def show(report: Report) -> dict:
    says, sentences = verdict(report)
    return {"says": says, "sentences": sentences}


PANEL = Panel("report", 10, show, template="{{ m.verdict(says, sentences) }}")
