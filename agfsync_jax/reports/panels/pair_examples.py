"""The pairs themselves: prompt, images, scores, answers, margin."""

from agfsync_jax.reports import cards
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.panels import Panel

ABOUT = {
    "A random sample": "fixed by the seed of the run, not picked by hand",
    "The largest margins": "what training sees most clearly",
    "The smallest margins": "would you have chosen the same?",
    "Where the scores disagree most": "one score is much for the chosen image, another against",
}


def show(gallery: Gallery) -> dict:
    examples = [example for found in gallery.examples.values() for example in found]
    return {
        "groups": {
            heading: [cards.of_pair(gallery, example) for example in found]
            for heading, found in gallery.examples.items()
        },
        "about": ABOUT,
        "gone": sum(side["png"] is None for example in examples for side in example["sides"]),
        "scored": bool(gallery.columns),
    }


TEMPLATE = """
<p class="faint">
{% if scored %}
Green: the better one by that score. Questions on which the two images differ first.
{% endif %}
{% if gone %}
<b>{{ gone|count("image") }} cannot be shown, as neither candidates/ nor pairs/ has them.</b>
agfsync sample draws the same again; config.pair.images=True stores them with the pairs.
{% endif %}
</p>
{{ m.groups(groups, about, css="") }}
"""
PANEL = Panel("pairs", 60, show, "The pairs", TEMPLATE)
