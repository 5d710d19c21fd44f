"""What a round's pairs look like in words: how they were made, and what is odd about them.

Takes what `data.gallery.read_gallery` gives; sentences are plain text, not yet escaped.
"""

from types import SimpleNamespace

import numpy as np

from agfsync_jax.reports import charts, panels, tallies

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
IMAGES = ("first image", "second image")  # candidates 0 and 1 of an imported row


def tally(source: SimpleNamespace) -> SimpleNamespace:
    """The figures that several panels tell.

    Returns:
        num_pairs; num_prompts: with a pair; total: all prompts there were (0: not known).
        weights: {column: its weight, not 0}; spreads: {column: tallies.Spread}.
        agreement: {column: shares of pairs whose chosen image is better, equal, worse by it}.
        wins: {candidate: tallies.Wins}.
    """
    pairs = source.pairs
    weights = source.settings.get("weights", {})
    return SimpleNamespace(
        num_pairs=len(pairs.margin),
        num_prompts=len(np.unique(pairs.prompts)),
        total=source.counts.get("prompts", 0),
        weights={name: weights[name] for name in panels.in_order(weights) if weights[name]},
        spreads={name: tallies.spread(source.prompts, x) for name, x in source.columns.items()},
        agreement={
            name: tallies.agreement(sign * source.chosen[name], sign * source.rejected[name])
            for name, sign in source.signs.items()
        },
        wins=tallies.wins(pairs.prompts, pairs.chosen, pairs.rejected),
    )


def count(number: int, word: str) -> str:
    """ "1 pair", "1,200 pairs"."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def how(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """The strategy, the weights and the normalization."""
    settings = source.settings
    if source.is_import:
        split = f", split {settings['split']}" if settings.get("split") else ""
        return f"People chose: the preferences come from {settings['path']}{split}. No scorer did."
    if not settings:
        return "How they were made is not known: there is no pair.json."
    strategy = STRATEGIES.get(settings["strategy"], settings["strategy"])
    parts = [strategy.format(k=settings.get("k", ""))]
    if settings.get("min_margin"):
        which = "best and worst " if source.is_ranked else ""
        parts.append(f"{which}at least {settings['min_margin']:g} apart")
    if settings.get("max_pairs") and not source.is_ranked:
        parts.append(f"at most {settings['max_pairs']} a prompt")
    terms = [f"{w:g} × {name}".replace("-", "−", w < 0) for name, w in told.weights.items()]
    kind = NORMALIZATIONS.get(settings["normalize"], settings["normalize"])
    return f"How: {', '.join(parts)}. The total is {' + '.join(terms)}, {kind}."


def warnings(source: SimpleNamespace, told: SimpleNamespace) -> list[str]:
    """What somebody should know before training on these pairs, a sentence each."""
    found = []
    if source.settings.get("shuffle_labels"):
        found.append(
            "which image of a pair is chosen was left to chance (config.pair.shuffle_labels). "
            "These pairs are a control and teach nothing."
        )
    if told.total and told.num_prompts < told.total / 2:
        share = charts.percent(round(1 - told.num_prompts / told.total, 2))
        found.append(f"{share} of the prompts gave no pair; the reasons are below.")
    if told.num_pairs < 20:
        found.append("with so few of them all figures here are rough.")
    if not source.columns and not source.is_import:
        found.append("scores/ is gone, so neither scores nor answers can be shown.")
    if source.columns:
        first = next(iter(source.columns))
        lost = np.isnan(source.chosen[first]) | np.isnan(source.rejected[first])
        if lost.any():
            found.append(
                f"{count(int(lost.sum()), 'pair')} of images that have no {first} score. If the "
                "scores were made anew, run agfsync pair again."
            )
    return found + _score_warnings(source, told) + _number_warnings(source, told)


def _score_warnings(source: SimpleNamespace, told: SimpleNamespace) -> list[str]:
    found = []
    weighted = [name for name in source.columns if name in told.weights]
    better = {name: told.agreement[name][0] for name in weighted}
    ranked = sorted((n for n in weighted if np.isfinite(better[n])), key=lambda n: -better[n])
    if len(ranked) > 1 and better[ranked[0]] >= 0.95 and better[ranked[1]] < 0.8:
        others = ", ".join(f"by {n} in {charts.percent(round(better[n], 2))}" for n in ranked[1:])
        found.append(
            f"{ranked[0]} decides almost alone. The chosen image is the better one by "
            f"{ranked[0]} in {charts.percent(round(better[ranked[0]], 2))} of the pairs, {others}."
        )
    for name, (higher, _, lower) in told.agreement.items():
        if lower > 0.55 * (higher + lower):
            share = charts.percent(round(lower, 2))
            found.append(f"in {share} of the pairs the rejected image is the better one by {name}.")
    for name in weighted:
        spread = told.spreads[name]
        if spread.overall == 0:
            found.append(f"{name} is the same for all images: it has no say.")
        elif spread.share < 0.1:
            found.append(
                f"{name} hardly tells the images of a prompt apart: within a prompt it varies by "
                f"{charts.percent(round(spread.share, 3))} of what it varies overall."
            )
    signed = [source.signs[name] * source.columns[name] for name in weighted]
    within = tallies.correlations(signed, source.prompts)
    freedom = max(len(source.prompts) - len(np.unique(source.prompts)), 1)
    for i, first in enumerate(weighted):
        for j in range(i):
            # Three standard errors of a correlation that is 0 in truth, and not next to nothing.
            if within[i, j] < -max(0.05, 3 / freedom**0.5):
                value = panels.number("", within[i, j])[:-1]
                found.append(
                    f"{weighted[j]} and {first} contradict each other: among the images of a "
                    f"prompt their correlation is {value}."
                )
    return found


def _number_warnings(source: SimpleNamespace, told: SimpleNamespace) -> list[str]:
    biased = {number: wins for number, wins in told.wins.items() if wins.is_biased}
    if not biased:
        return []
    parts = []
    for number, wins in biased.items():
        name = f"the {IMAGES[number]}" if source.is_import else f"candidate {number}"
        share = charts.percent(round(wins.share, 2))
        number_of = wins.chosen + wins.rejected
        if source.is_ranked:
            parts.append(f"{name} is best and not worst in {share} of {number_of:,} rankings")
        else:
            parts.append(f"{name} is chosen in {share} of its {count(number_of, 'pair')}")
    why = "Training may teach what sets it apart instead of the preference."
    if source.is_import:
        why = "People may have preferred a side of the screen."
    elif 0 in biased:
        why = (
            "Candidate 0 alone is drawn without config.sample.conditioning_noise: training may "
            "teach that difference instead of the preference."
        )
    return [f"{', '.join(parts)}, where half would be even. {why}"]
