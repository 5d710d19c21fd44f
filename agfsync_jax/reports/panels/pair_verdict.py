"""What these pairs are, in words: how they were made, and what is odd about them."""

import numpy as np

from agfsync_jax.reports import tallies
from agfsync_jax.reports.candidates import Gallery
from agfsync_jax.reports.cards import IMAGES
from agfsync_jax.reports.formats import count, percent, whole_percent
from agfsync_jax.reports.panels import Panel

STRATEGIES = {
    "best_worst": "the best image of each prompt against its worst",
    "all_above_margin": "every two images of a prompt",
    "top_k_bottom_k": "each of the {k} best images of a prompt against each of its {k} worst",
    "ranked": "all images of a prompt in order, best first",
}
NORMALIZATIONS = {
    "none": "of the raw scores",
    "zscore": "of scores in standard deviations within the prompt",
    "rank": "of ranks within the prompt, from 0 for the lowest score to 1 for the highest",
    "minmax": "of scores that run from 0 to 1 within the prompt",
}


def how(gallery: Gallery) -> str:
    """The strategy, the weights and the normalization."""
    settings = gallery.settings
    if gallery.is_import:
        split = f", split {settings['split']}" if settings.get("split") else ""
        return f"People chose: the preferences come from {settings['path']}{split}. No scorer did."
    if not settings:
        return "How they were made is not known: there is no pair.json."
    strategy = STRATEGIES.get(settings["strategy"], settings["strategy"])
    parts = [strategy.format(k=settings.get("k", ""))]
    if settings.get("min_margin"):
        which = "best and worst " if gallery.is_ranked else ""
        parts.append(f"{which}at least {settings['min_margin']:g} apart")
    if settings.get("max_pairs") and not gallery.is_ranked:
        parts.append(f"at most {settings['max_pairs']} a prompt")
    terms = [f"{w:g} × {name}".replace("-", "−", w < 0) for name, w in gallery.weights.items()]
    kind = NORMALIZATIONS.get(settings["normalize"], settings["normalize"])
    return f"How: {', '.join(parts)}. The total is {' + '.join(terms)}, {kind}."


def warnings(gallery: Gallery) -> list[str]:
    """What somebody should know before training on these pairs, a sentence each."""
    found = []
    if gallery.settings.get("shuffle_labels"):
        found.append(
            "which image of a pair is chosen was left to chance (config.pair.shuffle_labels). "
            "These pairs are a control and teach nothing."
        )
    if gallery.num_all_prompts and gallery.num_prompts < gallery.num_all_prompts / 2:
        share = whole_percent(1 - gallery.num_prompts / gallery.num_all_prompts)
        found.append(f"{share} of the prompts gave no pair; the reasons are below.")
    if gallery.num_pairs < 20:
        found.append("with so few of them all figures here are rough.")
    if not gallery.columns and not gallery.is_import:
        found.append("scores/ is gone, so neither scores nor answers can be shown.")
    if gallery.columns:
        first = next(iter(gallery.columns))
        lost = np.isnan(gallery.chosen[first]) | np.isnan(gallery.rejected[first])
        if lost.any():
            found.append(
                f"{count(int(lost.sum()), 'pair')} of images that have no {first} score. If the "
                "scores were made anew, run agfsync pair again."
            )
    return found + _score_warnings(gallery) + _number_warnings(gallery)


def _score_warnings(gallery: Gallery) -> list[str]:
    found = []
    agreement, spreads, signs = gallery.agreement, gallery.spreads, gallery.signs
    weighted = [name for name in gallery.columns if name in gallery.weights]
    better = {name: agreement[name][0] for name in weighted}
    ranked = sorted((n for n in weighted if np.isfinite(better[n])), key=lambda n: -better[n])
    if len(ranked) > 1 and better[ranked[0]] >= 0.95 and better[ranked[1]] < 0.8:
        others = ", ".join(f"by {n} in {whole_percent(better[n])}" for n in ranked[1:])
        found.append(
            f"{ranked[0]} decides almost alone. The chosen image is the better one by "
            f"{ranked[0]} in {whole_percent(better[ranked[0]])} of the pairs, {others}."
        )
    for name, (higher, _, lower) in agreement.items():
        if lower > 0.55 * (higher + lower):
            share = whole_percent(lower)
            found.append(f"in {share} of the pairs the rejected image is the better one by {name}.")
    for name in weighted:
        spread = spreads[name]
        if spread.overall == 0:
            found.append(f"{name} is the same for all images: it has no say.")
        elif spread.share < 0.1:
            found.append(
                f"{name} hardly tells the images of a prompt apart: within a prompt it varies by "
                f"{percent(round(spread.share, 3))} of what it varies overall."
            )
    signed = [signs[name] * gallery.scores[name] for name in weighted]
    within = tallies.correlations(signed, gallery.prompts)
    freedom = max(len(gallery.prompts) - len(np.unique(gallery.prompts)), 1)
    for i, first in enumerate(weighted):
        for j in range(i):
            # Three standard errors of a correlation that is 0 in truth, and not next to nothing.
            if within[i, j] < -max(0.05, 3 / freedom**0.5):
                found.append(
                    f"{weighted[j]} and {first} contradict each other: among the images of a "
                    f"prompt their correlation is −{-within[i, j]:.2f}."
                )
    return found


def _number_warnings(gallery: Gallery) -> list[str]:
    biased = {number: wins for number, wins in gallery.wins.items() if wins.is_biased}
    if not biased:
        return []
    parts = []
    for number, wins in biased.items():
        name = f"the {IMAGES[number]}" if gallery.is_import else f"candidate {number}"
        share = whole_percent(wins.share)
        number_of = wins.chosen + wins.rejected
        if gallery.is_ranked:
            parts.append(f"{name} is best and not worst in {share} of {number_of:,} rankings")
        else:
            parts.append(f"{name} is chosen in {share} of its {count(number_of, 'pair')}")
    why = "Training may teach what sets it apart instead of the preference."
    if gallery.is_import:
        why = "People may have preferred a side of the screen."
    elif 0 in biased:
        why = (
            "Candidate 0 alone is drawn without config.sample.conditioning_noise: training may "
            "teach that difference instead of the preference."
        )
    return [f"{', '.join(parts)}, where half would be even. {why}"]


def show(gallery: Gallery) -> dict:
    of = f"{gallery.num_prompts:,} prompts"
    if everything := gallery.num_all_prompts:
        share = whole_percent(gallery.num_prompts / everything)
        of = f"{gallery.num_prompts:,} of {everything:,} prompts ({share} gave one)"
    pairs = count(gallery.num_pairs, "ranking" if gallery.is_ranked else "pair")
    sentences = [f"{pairs} from {of}.", how(gallery)]
    found = warnings(gallery)
    if not gallery.is_import and gallery.scores and not found:
        sentences.append(
            "Nothing looks odd: most prompts gave a pair, no score decides alone or goes against "
            "the pairs, each tells the images of a prompt apart, no two contradict each other, and "
            "no candidate number clearly wins or loses."
        )
    sentences += [f"Look at this: {sentence}" for sentence in found]
    return {"says": "warn" if found else "good", "sentences": sentences}


PANEL = Panel("pairs", 10, show, template="{{ m.verdict(says, sentences) }}")
