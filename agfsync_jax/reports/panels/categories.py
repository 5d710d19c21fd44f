"""Every score by the category of its prompt, base against tuned, with 95% intervals."""

import numpy as np

from agfsync_jax.reports import formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report
from agfsync_jax.utils.statistics import bootstrap

SHOWN = 20  # categories, those with the most prompts


def show(report: Report) -> dict:
    last = report.last
    rows = [
        {(row["prompt_id"], row["candidate"]): row for row in last.rows[model]}
        for model in ("base", "tuned")
    ]
    keys: dict[str, list] = {}
    for key in sorted(rows[0].keys() & rows[1].keys()):
        if category := last.prompts.get(key[0], {}).get("category"):
            keys.setdefault(category, []).append(key)
    if len(keys) < 2:
        return {}
    sizes = {category: len({key[0] for key in found}) for category, found in keys.items()}
    shown = sorted(keys, key=lambda category: (-sizes[category], category))[:SHOWN]
    tables = {}
    for name, column in report.columns.items():
        if name not in last.delta:
            continue
        tables[name] = []
        for category in shown:
            prompts = np.array([key[0] for key in keys[category]])
            base, tuned = (np.array([of[key][name] for key in keys[category]]) for of in rows)
            figures = (
                formats.value(column, bootstrap(base, prompts)),
                formats.value(column, bootstrap(tuned, prompts)),
                formats.change(column, bootstrap(tuned - base, prompts)),
            )
            tables[name].append((category, formats.count(sizes[category], "prompt"), figures))
    note = "Prompts of one category at a time; small figures are 95% intervals."
    if len(keys) > SHOWN:
        note += f" The {SHOWN} categories of {len(keys):,} that have the most prompts."
    return {"tables": tables, "note": note}


PANEL = Panel(
    "report",
    70,
    show,
    "By category of prompt",
    """
{% for name, rows in tables.items() %}
<details class="card"{% if loop.first %} open{% endif %}><summary>{{ name }}</summary>
{{ m.figures(["Base", "Tuned", "Change"], rows) }}</details>
{% endfor %}
""",
)
