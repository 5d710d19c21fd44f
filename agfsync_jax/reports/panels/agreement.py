"""Which scores order images alike, over all images and within prompts; and with the pairs."""

import numpy as np

from agfsync_jax.reports import charts, tallies
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.panels import Panel

COLORS = {"better": charts.BETTER, "equal": "#98a2b3", "worse": charts.WORSE}


def show(gallery: Gallery) -> dict:
    names = list(gallery.columns)
    scores = [gallery.scores[name] for name in names]
    matrices = {}
    if len(names) > 1:
        matrices = {
            "Correlation over all images": tallies.correlations(scores).tolist(),
            "Correlation within prompts": tallies.correlations(scores, gallery.prompts).tolist(),
        }
    signs = gallery.signs
    shares = [
        (
            name if signs[name] > 0 else f"{name} (lower is better)",
            list(zip(COLORS, found, COLORS.values(), strict=True)),
        )
        for name, found in gallery.agreement.items()
        if np.isfinite(found).all()
    ]
    if not matrices and not shares:
        return {}
    note = (
        "1: both scores order images alike; 0: they have nothing to do with each other; −1: they "
        "order them the other way round. Only what is left within prompts can make a pair."
    )
    return {
        "names": names,
        "matrices": matrices,
        "best": f"{gallery.sides[0]} image",
        "shares": shares,
        "colors": COLORS.items(),
        "note": note if matrices else "",
    }


TEMPLATE = """
{% macro heat(value) %}
{% if value != value %}<div class="heat">–</div>{% else %}
<div class="heat" style="background: rgba({{ "36, 87, 214" if value > 0 else "217, 115, 13" }},
 {{ "%.2f"|format(0.75 * value|abs) }})">
{{ ("%.2f"|format(value)).replace("-0.00", "0.00").replace("-", "−") }}</div>{% endif %}
{% endmacro %}
<div class="cards">
{% for heading, matrix in matrices.items() %}
<div class="card"><h3>{{ heading }}</h3>
<div class="scroll"><table class="heats">{{ m.header([""] + names[:-1]) }}<tbody>
{% for name in names[1:] %}
{% set row = loop.index %}
<tr><td>{{ name }}</td>
{% for value in matrix[row][:-1] %}
<td>{% if loop.index0 < row %}{{ heat(value) }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div></div>
{% endfor %}
{% if shares %}
<div class="card"><h3>By each score, the {{ best }} is</h3>{{ m.keys(colors) }}
{% for name, parts in shares %}
<div class="shares">{{ name }}<div>
{% for _, share, color in parts if share %}
<i style="width: {{ "%.1f"|format(100 * share) }}%; background: {{ color }}">
{%- if share > 0.08 %}{{ share|percent }}{% endif %}</i>
{% endfor %}
</div></div>
{% endfor %}
</div>
{% endif %}
</div>
"""
PANEL = Panel("pairs", 40, show, "Do the scores agree?", TEMPLATE)
