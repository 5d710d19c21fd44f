"""What share of the answers is right, by kind of question: of all, chosen, rejected images."""

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.panels import Panel

KINDS = 14  # kinds of question shown; the rest is taken together
COLORS = {"all": charts.ALL, "rejected": charts.WORSE, "chosen": charts.BETTER}


def show(gallery: Gallery) -> dict:
    if not gallery.answers:
        return {}
    return {
        "tables": {scorer: _rows(kinds) for scorer, kinds in gallery.answers.items()},
        "header": ["asked about", "0 to 100% right", "all", *gallery.sides],
        "colors": COLORS,
        "note": "Answers as the prompt expects them, by what the question is about; what could not "
        "be answered is left out, and an image counts as often as it is in a pair. Where the "
        "chosen images are far to the right of the rejected ones, the pairs teach that kind of "
        "thing.",
    }


def _rows(kinds: dict[str, dict]) -> list[dict]:
    """Of each kind of question the answers, the shares that are right, and these as text."""
    most = sorted(kinds, key=lambda kind: -kinds[kind]["all"][1])
    shown = {kind: kinds[kind] for kind in most[: KINDS if len(most) > KINDS + 1 else None]}
    if rest := most[len(shown) :]:
        shown[f"{len(rest)} other kinds"] = {
            side: sum(kinds[kind][side] for kind in rest) for side in COLORS
        }
    rows = []
    for kind, counts in shown.items():
        shares = {side: right / max(answered, 1) for side, (right, answered) in counts.items()}
        texts = {
            side: formats.number(formats.SHARE, shares[side]) if counts[side][1] else "–"
            for side in COLORS
        }
        number = int(counts["all"][1])
        rows.append({"kind": kind, "number": number, "shares": shares, "texts": texts})
    return sorted(rows, key=lambda row: row["shares"]["rejected"] - row["shares"]["chosen"])


TEMPLATE = """
{% for scorer, rows in tables.items() %}
<div class="card">{% if tables|length > 1 %}<h3>{{ scorer }}</h3>{% endif %}

<table class="strips">{{ m.header(header) }}<tbody>
{% for row in rows %}
<tr><td>{{ m.text(row.kind) }}<small>{{ row.number|count("answer") }}</small></td>
<td><div class="strip">
{%- for side, color in colors.items() if row.texts[side] != "–" -%}
<i style="left: {{ "%.1f"|format(100 * row.shares[side]) }}%; background: {{ color }}"></i>
{%- endfor -%}
</div></td>
<td>{{ row.texts.all }}</td>
<td><span class="better">{{ row.texts.chosen }}</span></td>
<td><span class="worse">{{ row.texts.rejected }}</span></td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
"""
PANEL = Panel("pairs", 50, show, "Answers", TEMPLATE)
