"""A histogram a score, of all images and of those in pairs; of the margin; and the spreads."""

import numpy as np

from agfsync_jax.reports import charts, formats
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.panels import Panel


def show(gallery: Gallery) -> dict:
    better, worse = gallery.sides
    shown = [
        charts.histogram(
            name,
            {
                "all": gallery.scores[name],
                better: gallery.chosen[name],
                worse: gallery.rejected[name],
            },
            column,
            bins=20,
            colors=(charts.ALL, charts.BETTER, charts.WORSE),
            outlined=gallery.sides,
        )
        for name, column in gallery.columns.items()
    ]
    margin = gallery.pairs.margin
    if np.ptp(margin):
        title, colors = "margin: how far apart the totals are", charts.COLORS[1:]
        margins = {"all pairs": margin}
        shown.append(charts.histogram(title, margins, formats.TOTAL, bins=20, colors=colors))
    spreads = [
        (
            name,
            spread.share,
            *(formats.number(gallery.columns[name], x, signed=True)[1:] for x in spread),
        )
        for name, spread in gallery.spreads.items()
        if np.isfinite(spread.share)
    ]
    if not any(shown) and not spreads:
        return {}
    note = (
        "Share of the images at each score; the figures beside the names are means. Good pairs "
        "lie apart: where the two lines are one, the score had no say."
    )
    return {"charts": shown, "spreads": spreads, "note": note if gallery.columns else ""}


TEMPLATE = """
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
"""
PANEL = Panel("pairs", 30, show, "Scores", TEMPLATE)
