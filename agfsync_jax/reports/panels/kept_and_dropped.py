"""What was kept, and what was not for which reason, of prompts, pairs, images; and who wins."""

from agfsync_jax.data.preferences import COUNTS
from agfsync_jax.reports import charts
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.cards import IMAGES
from agfsync_jax.reports.charts import ALL, BETTER, WORSE
from agfsync_jax.reports.panels import Panel

PAIRS = "rankings looked at", "pairs looked at"


def show(gallery: Gallery) -> dict:
    note = "Each thing that was dropped is counted once, under the first reason that holds."
    if not gallery.is_import:
        note += (
            " For more or other pairs, change config.pair and run agfsync pair again: nothing is "
            "drawn or scored anew."
        )
    return {
        "units": {unit: rows for unit, rows in _by_unit(gallery).items() if rows},
        "left_out": _left_out(gallery.scoring.get("left_out", [])),
        "scored": bool(gallery.scoring),
        "wins": _wins(gallery),
        "note": note,
    }


def _by_unit(gallery: Gallery) -> dict[str, list[tuple[str, int, str]]]:
    """{of what: [(what became of it, how many, color)]}, those kept first."""
    pairs = "rows of the preference set" if gallery.is_import else PAIRS[not gallery.is_ranked]
    names = {"candidates": "images", "pairs": pairs, "imported rows": pairs}
    units: dict[str, list] = {"prompts": [], pairs: [], "images": [], "other counts": []}
    for key, value in gallery.counts.items():
        if key == "prompts" or not isinstance(value, int) or not value:
            continue
        if key == "pairs":
            units[pairs].append(("kept", value, BETTER))
        elif key in COUNTS:
            of, what = COUNTS[key]
            units[names.get(of, of)].append((what, value, ALL))
        else:
            units["other counts"].append((key, value, ALL))
    if gallery.num_all_prompts and not gallery.is_import:
        dropped = sum(value for _, value, _ in units["prompts"])
        rest = gallery.num_all_prompts - gallery.num_prompts - dropped
        units["prompts"].insert(0, ("that gave one or more", gallery.num_prompts, BETTER))
        if rest > 0:
            text = "whose images are alike, or too close to each other"
            units["prompts"].append((text, rest, ALL))
    if scored := len(gallery.prompts):
        left = scored - sum(value for _, value, _ in units["images"])
        units["images"].insert(0, ("with all scores", left, BETTER))
        if (lost := gallery.scoring.get("images", scored) - scored) > 0:
            units["images"].append(("that could not be read", lost, ALL))
    sizes = gallery.counts.get("sizes", {}).items()
    units["pairs, by height x width"] = [(size, value, BETTER) for size, value in sizes]
    return units


def _left_out(lines: list[str]) -> list[tuple[str, list[str]]]:
    """What `agfsync score` left out, in its own words, with examples."""
    told: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("left out: "):
            told.append((line.removeprefix("left out: "), []))
        elif told:
            told[-1][1].append(line)
    return told


def _wins(gallery: Gallery) -> charts.Chart:
    """How often the candidate of each number is chosen and rejected."""
    wins = gallery.wins
    title, labels = "Pairs by candidate number", [str(number) for number in wins]
    if gallery.is_ranked:
        title = "Rankings by candidate number"
    if gallery.is_import:
        title, labels = "Pairs by image of a row", [IMAGES[number] for number in wins]
    counts = ([each.chosen for each in wins.values()], [each.rejected for each in wins.values()])
    groups = dict(zip(gallery.sides, counts, strict=True))
    return charts.bars(title, labels, groups, colors=(BETTER, WORSE))


TEMPLATE = """
{% macro scoring() %}
<p class="note">Scoring left {{ "out:" if left_out else "nothing out." }}</p>
{% for what, examples in left_out %}
<details class="note"><summary>{{ m.text(what) }}</summary>
<ul>{% for each in examples %}<li>{{ m.text(each) }}</li>{% endfor %}</ul></details>
{% endfor %}
{% endmacro %}
<div class="cards">
{% for unit, rows in units.items() %}
{% set total = rows|sum(attribute=1) %}
<div class="card"><h3>{{ "{:,}".format(total) }} {{ unit }}</h3>
<table class="counts"><tbody>
{% for what, number, color in rows %}
<tr><td>{{ what }}{{ m.bar(number / total, color) }}</td>
<td>{{ "{:,}".format(number) }}</td><td>{{ (number / total)|percent }}</td></tr>
{% endfor %}
</tbody></table>
{% if unit == "images" and scored %}{{ scoring() }}{% endif %}
</div>
{% endfor %}
{% if "images" not in units and scored %}<div class="card">{{ scoring() }}</div>{% endif %}
<div class="card">{{ m.chart(wins) }}
<p class="note">Where both bars are about as high, the number has no part in who wins.</p></div>
</div>
"""
PANEL = Panel("pairs", 20, show, "What was kept, and what was dropped", TEMPLATE)
