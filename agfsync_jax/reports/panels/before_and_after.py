"""Pictures of base and tuned model side by side."""

from agfsync_jax.reports import cards
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def show(report: Report) -> dict:
    if not any(report.examples.values()):
        return {}
    return {
        "groups": {
            heading: [cards.of_models(report, example) for example in examples]
            for heading, examples in report.examples.items()
        },
        "note": "Same prompt, same seed, base beside tuned, with the answer to each question about "
        "them. The random sample is fixed by the seed of the run, not picked by hand.",
    }


PANEL = Panel("report", 50, show, "Before and after", "{{ m.groups(groups) }}")
