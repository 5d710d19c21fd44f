"""What these pairs are, in words, and what looks odd about them."""

from agfsync_jax.reports import findings
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.formats import count, whole_percent
from agfsync_jax.reports.panels import Panel


def show(gallery: Gallery) -> dict:
    of = f"{gallery.num_prompts:,} prompts"
    if everything := gallery.num_all_prompts:
        share = whole_percent(gallery.num_prompts / everything)
        of = f"{gallery.num_prompts:,} of {everything:,} prompts ({share} gave one)"
    pairs = count(gallery.num_pairs, "ranking" if gallery.is_ranked else "pair")
    sentences = [f"{pairs} from {of}.", findings.how(gallery)]
    found = findings.warnings(gallery)
    if not gallery.is_import and gallery.scores and not found:
        sentences.append(
            "Nothing looks odd: most prompts gave a pair, no score decides alone or goes against "
            "the pairs, each tells the images of a prompt apart, no two contradict each other, and "
            "no candidate number clearly wins or loses."
        )
    sentences += [f"Look at this: {sentence}" for sentence in found]
    return {"says": "warn" if found else "good", "sentences": sentences}


PANEL = Panel("pairs", 10, show, template="{{ m.verdict(says, sentences) }}")
