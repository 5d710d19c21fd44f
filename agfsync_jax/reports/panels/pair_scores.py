"""A histogram a score, of all images and of those in pairs; of the margin; and the spreads."""

import functools

import numpy as np

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.panels import Panel

COLORS = "#c3cad6", "#0b7a4b", "#b3261e"  # all, chosen, rejected


def show(gallery: Gallery) -> dict:
    shown = [
        charts.histogram(
            name,
            dict(
                zip(
                    ("all", *gallery.sides),
                    (gallery.scores[name], gallery.chosen[name], gallery.rejected[name]),
                    strict=True,
                )
            ),
            bins=20,
            x_format=formats.percent if formats.is_share(column) else formats.plain,
            mean_format=functools.partial(formats.number, column),
            colors=COLORS,
            outlined=gallery.sides,
        )
        for name, column in gallery.columns.items()
    ]
    margin = gallery.pairs.margin
    if np.ptp(margin):
        title = "margin: how far apart the totals are"
        shown.append(
            charts.histogram(
                title,
                {"all pairs": margin},
                bins=20,
                mean_format=formats.total,
                colors=charts.COLORS[1:],
            )
        )
    spreads = [
        (name, spread.share, *(_size(gallery.columns[name], size) for size in spread))
        for name, spread in gallery.spreads.items()
        if np.isfinite(spread.share)
    ]
    note = (
        "Share of the images at each score; the figures beside the names are means. Good pairs "
        "lie apart: where the two lines are one, the score had no say."
        if gallery.columns
        else ""
    )
    return {"charts": shown, "spreads": spreads, "note": note} if any(shown) or spreads else {}


def _size(column, deviation: float) -> str:
    return formats.number(column, deviation, signed=True).removeprefix("+")


PANEL = Panel(
    "pairs",
    30,
    show,
    "Scores",
    """
<div class="cards">
{% for each in charts if each %}<div class="card">{{ m.chart(each) }}</div>{% endfor %}

{% if spreads %}
<div class="card"><h3>Do scores differ within a prompt?</h3>
<table class="counts">{{ m.header(["", "within", "overall"]) }}<tbody>
{% for name, share, overall, within in spreads %}
<tr><td>{{ name }}: {{ share|percent }}{{ m.bar([share, 1]|min) }}</td>
<td>{{ within }}</td><td>{{ overall }}</td></tr>
{% endfor %}
</tbody></table>
<p class="note">Standard deviation within a prompt and over all images. A score that is the same for
all images of a prompt cannot choose between them.</p></div>
{% endif %}
</div>
""",
)
