"""Chosen beside rejected, of the last round with pairs; its gallery has more of them."""

from agfsync_jax.data.preferences import COUNTS
from agfsync_jax.reports import cards
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report

SHOWN = 4  # pairs a heading


def show(report: Report) -> dict:
    if not (gallery := report.gallery):
        return {}
    headings = [name for name in gallery.examples if name.endswith(" margins")]
    found = {name: gallery.examples[name][:SHOWN] for name in headings or gallery.examples}
    told = [
        f"{gallery.counts[key]:,} {each.text}"
        for key, each in COUNTS.items()
        if key != "prompts" and gallery.counts.get(key)
    ]
    return {
        "groups": {name: [cards.of_pair(gallery, e) for e in each] for name, each in found.items()},
        "note": f"Of {gallery.label}. " + (f"{'; '.join(told)}." if told else ""),
    }


PANEL = Panel("report", 100, show, "What it learned from", "{{ m.groups(groups) }}")
