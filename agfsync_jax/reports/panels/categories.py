"""Every score by the category of its prompt, base against tuned, with 95% intervals."""

from collections import defaultdict

import numpy as np

from agfsync_jax.reports import formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report
from agfsync_jax.utils.statistics import bootstrap

SHOWN = 20  # categories, those with the most prompts


def show(report: Report) -> dict:
    last = report.last
    images = defaultdict(list)  # category -> score rows of base and tuned
    for (prompt, _), rows in last.images().items():
        if category := last.prompts.get(prompt, {}).get("category"):
            images[category].append(rows)
    if len(images) < 2:
        return {}
    prompts = {
        category: np.array([base["prompt_id"] for base, _ in found])
        for category, found in images.items()
    }
    sizes = {category: len(set(ids.tolist())) for category, ids in prompts.items()}
    shown = sorted(images, key=lambda category: (-sizes[category], category))[:SHOWN]
    tables = {name: [] for name in report.columns if name in last.delta}
    for name, rows in tables.items():
        column = report.columns[name]
        for category in shown:
            both = np.array([[row[name] for row in pair] for pair in images[category]])
            scored = np.isfinite(both).all(axis=1)
            if not scored.any():
                continue
            (base, tuned), of = both[scored].T, prompts[category][scored]
            figures = (
                formats.value(column, bootstrap(base, of)),
                formats.value(column, bootstrap(tuned, of)),
                formats.change(column, bootstrap(tuned - base, of)),
            )
            rows.append((category, formats.count(sizes[category], "prompt"), figures))
    note = "Prompts of one category at a time; small figures are 95% intervals."
    if len(images) > SHOWN:
        note += f" The {SHOWN} categories of {len(images):,} that have the most prompts."
    return {"tables": tables, "note": note}


TEMPLATE = """
{% for name, rows in tables.items() %}
<details class="card"{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
{{ m.figures(["Base", "Tuned", "Change"], rows) }}</details>
{% endfor %}
"""
PANEL = Panel("report", 70, show, "By category of prompt", TEMPLATE)
