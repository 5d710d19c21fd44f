"""Scores to preferences: which of a prompt's candidates is chosen, and which is rejected.

Pure functions of numpy arrays: no images, no files, nothing drawn at random but `shuffle_labels`.
"""

import hashlib
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NORMALIZATIONS = ("none", "zscore", "rank", "minmax")
STRATEGIES = ("best_worst", "all_above_margin", "top_k_bottom_k", "ranked")
_LEAST = {"min_margin": 0, "max_pairs": 0, "min_questions": 0, "k": 1, "max_rows": 0}
# What config.pair.columns names, of an imported set.
IMPORTED = ("caption", "first", "second", "label")
# Scores are float32: values that differ by less are one value, or zscore would blow noise up.
_ROUNDING = 1e-6


class Count(NamedTuple):
    """A number of pair.json: of what (pairs, prompts, ...), and what became of it."""

    of: str
    what: str

    @property
    def text(self) -> str:
        """In words; that pairs are what is counted goes without saying."""
        return self.what if self.of == "pairs" else f"{self.of} {self.what}"


# What pair.json counts, each dropped thing once, under the first reason that holds.
COUNTS = {
    "pairs": Count("pairs", "pairs (or rankings) kept"),
    "prompts": Count("prompts", "there were"),
    "few_questions": Count("prompts", "with fewer questions than the minimum"),
    "too_few": Count("prompts", "without two images that count"),
    "unanswered": Count("candidates", "with a question that could not be answered"),
    "nonfinite": Count("candidates", "with a score that is not finite"),
    "ties": Count("pairs", "ties"),
    "margin": Count("pairs", "below the margin"),
    "limit": Count("pairs", "above the limit a prompt"),
    "unlabelled": Count("imported rows", "without a label"),
    "empty_captions": Count("imported rows", "without a caption"),
    "bad_images": Count("imported rows", "with an image that cannot be decoded"),
}


def told(counts: Mapping[str, int]) -> str:
    """The counts in one line; of what was dropped, the reasons that there are."""
    reasons = [name for name in COUNTS if counts[name] and name not in ("pairs", "prompts")]
    dropped = ", ".join(f"{counts[name]} {COUNTS[name].text}" for name in reasons)
    head = f"{counts['pairs']} pairs from {counts['prompts']} prompts"
    return f"{head}; dropped: {dropped or 'nothing'}"


# What to do where no pair is left, by the reason that dropped the most, of COUNTS.
_ADVICE = {
    "few_questions": "lower config.pair.min_questions ({min_questions}), or write more questions",
    "too_few": "draw more candidates, and look at score.json for images that were left out",
    "unanswered": "look at score.json for the questions that could not be answered",
    "nonfinite": "look at score.json for the scorer whose scores are not finite",
    "ties": "take a finer score, such as config.scorers.vqa.score='probability', or draw more"
    " candidates",
    "margin": "lower config.pair.min_margin ({min_margin}), or draw more candidates",
}


def advice(counts: Mapping[str, int], settings: Any) -> str:
    """What to change in `config.pair` or before it, where no pair is left."""
    reason = max(_ADVICE, key=lambda name: counts[name])
    return _ADVICE[reason].format(**settings)


class Scored(NamedTuple):
    """The scores of a shard's candidates, a row each, and what is known of their questions."""

    prompt_ids: Sequence[str]  # [n]
    candidates: Sequence[int]  # [n]
    columns: Mapping[str, np.ndarray]  # float [n] each, NaN where there is no score
    # (prompt id, candidate) of those that a scorer could not ask all of their questions
    unanswered: frozenset[tuple[str, int]] = frozenset()
    num_questions: Mapping[str, int] = {}  # that each prompt was asked
    num_images: int | None = None  # in the shard of candidates, also those without scores


class Choice(NamedTuple):
    """Candidates of one prompt in order of preference, before their images are looked up.

    Of two candidates the first is chosen and the second rejected; more are a ranking.
    """

    shard: str
    prompt_id: str
    candidates: tuple[int, ...]  # best first
    scores: tuple[float, ...]

    @property
    def pair_id(self) -> str:
        """The same, whatever the order."""
        return "-".join([self.prompt_id, *map(str, sorted(self.candidates))])

    @property
    def margin(self) -> float:
        """How much higher the first one's score is than the last one's."""
        return self.scores[0] - self.scores[-1]


def normalize(scores: np.ndarray, method: str) -> np.ndarray:
    """One score column of one prompt's candidates, [n] -> [n], on a scale of its own.

    none: as it is. zscore: mean 0, standard deviation 1. rank: 0 for the lowest to 1 for the
    highest, equal values share the mean of their ranks. minmax: lowest 0, highest 1. Values that
    are all equal have no say: they become 0.
    """
    x = np.asarray(scores, np.float64)
    if method == "none":
        return x
    spread, rounding = np.ptp(x), _ROUNDING * np.abs(x).max()
    if spread <= rounding:
        return np.zeros_like(x)
    if method == "zscore":
        return (x - x.mean()) / x.std()
    if method == "rank":
        higher = x[:, None] - x[None, :]
        ranks = ((higher > rounding).sum(1) + (higher >= -rounding).sum(1) - 1) / 2
        return ranks / (len(x) - 1)
    return (x - x.min()) / spread


def combine(columns: dict[str, np.ndarray], weights: dict[str, float], method: str) -> np.ndarray:
    """The weighted sum of the normalized columns, [n]; columns without a weight have no say."""
    return sum(weight * normalize(columns[name], method) for name, weight in weights.items())


def same(columns: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """bool [n, n]: which candidates have the same raw scores in every column that has a weight."""
    weighted = [columns[name] for name in weights]
    close = [np.abs(x[:, None] - x[None]) <= _ROUNDING * np.abs(x[None]) for x in weighted]
    return np.logical_and.reduce(close)


def select(
    scores: Sequence[float],
    tied: np.ndarray,
    *,
    strategy: str,
    k: int = 2,
    min_margin: float = 0.0,
    max_pairs: int = 0,
) -> tuple[list[tuple[int, ...]], Counter]:
    """Picks (chosen, rejected) among one prompt's candidates, or ranks them.

    best_worst: the highest score against the lowest. top_k_bottom_k: each of the `k` highest
    against each of the `k` lowest, k being cut to half of the candidates. all_above_margin: every
    pair of candidates. The largest margins come first, at most `max_pairs` of them (0: no limit).
    ranked: one tuple of all candidates, best first, whose margin is that of the best and the worst.
    Of equal scores the first candidate counts as the higher, or as the lower where the lowest is
    looked for.

    Args:
        scores: [n], finite, n >= 2.
        tied: bool [n, n], candidates between which there is nothing to prefer.

    Returns:
        the pairs, and how many were dropped as "ties", for their "margin", and by the "limit".
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable
    if strategy == "ranked":
        found = [tuple(order)]
    elif strategy == "all_above_margin":
        found = itertools.combinations(order, 2)
    else:
        k = 1 if strategy == "best_worst" else min(k, len(order) // 2)
        found = itertools.product(order[:k], sorted(order[k:], key=lambda i: scores[i])[:k])
    kept, dropped = [], Counter()
    for each in sorted(found, key=lambda each: scores[each[-1]] - scores[each[0]]):
        margin = scores[each[0]] - scores[each[-1]]
        if tied[each[0], each[-1]] or margin <= 0:
            dropped["ties"] += 1
        elif margin < min_margin:
            dropped["margin"] += 1
        elif max_pairs and len(kept) == max_pairs:
            dropped["limit"] += 1
        else:
            kept.append(each)
    return kept, dropped


def check_settings(settings, *, of_people: bool) -> None:
    """Raises ValueError for a `config.pair` that cannot be followed.

    Args:
        of_people: whether its path names choices of theirs, or pairs, and no scores.
    """

    def expect(fits: bool, key: str, expected: str) -> None:
        if not fits:
            value = settings[key]
            value = value.to_dict() if key in ("weights", "columns") else value
            raise ValueError(f"config.pair.{key}={value!r}: expected {expected}.")

    for key, allowed in (("normalize", NORMALIZATIONS), ("strategy", STRATEGIES)):
        expect(settings[key] in allowed, key, " | ".join(allowed))
    for key, least in _LEAST.items():
        expect(settings[key] >= least, key, f"{least} or more")
    hub = 'the name that the Hugging Face Hub has for it, such as "cc-by-4.0" or "other"'
    expect(re.fullmatch(r"[A-Za-z0-9][\w.+-]*", settings.license), "license", hub)
    for key, is_set in (("shuffle_labels", settings.shuffle_labels), ("path", of_people)):
        if settings.strategy == "ranked" and is_set:
            raise ValueError(
                f"config.pair.{key}={settings[key]!r} makes pairs, and"
                " config.pair.strategy='ranked' none: set another strategy."
            )
    if not of_people:
        weights = settings.weights.values()
        finite = any(weights) and all(map(math.isfinite, weights))
        expect(finite, "weights", "numbers, one at least not 0")
        expect(not settings.buckets, "buckets", "0, as candidates have one size")
        return
    columns = settings.columns.to_dict()
    names = list(columns.values())
    named = set(columns) == set(IMPORTED) and all(isinstance(n, str) and n for n in names)
    each = f"a column's name for each of {', '.join(IMPORTED)}, and no others"
    expect(named, "columns", each)
    expect(len(set(names)) == len(names), "columns", "a different column for each")
    expect(0 <= settings.max_bad <= 1, "max_bad", "0 to 1")


def choose(
    scores: Mapping[str, Scored], prompts: Mapping[str, str], settings
) -> tuple[list[Choice], dict[str, int]]:
    """Picks the pairs of all prompts (id -> text), from the scores of all shards.

    Returns:
        the pairs in the order of the scores, and the numbers that `COUNTS` names.

    Raises:
        ValueError: a column that has a weight and is not there; a prompt that is not listed, or
            whose candidates lie in two shards.
    """
    weights = {name: weight for name, weight in settings.weights.items() if weight}
    counts = Counter(dict.fromkeys(COUNTS, 0), prompts=len(prompts), too_few=len(prompts))
    choices, place = [], {}
    for shard, scored in scores.items():
        if missing := [name for name in weights if name not in scored.columns]:
            raise ValueError(
                f"scores of shard {shard} have no column {missing[0]!r}, which"
                f" config.pair.weights names; they have {', '.join(scored.columns) or 'none'}."
            )
        groups = defaultdict(list)
        for row, prompt_id in enumerate(scored.prompt_ids):
            groups[prompt_id].append(row)
        for prompt_id, rows in groups.items():
            if prompt_id not in prompts or prompt_id in place:
                why = f"is in {place[prompt_id]} too" if prompt_id in place else "is not listed"
                raise ValueError(f"scores of shard {shard}: prompt {prompt_id!r} {why}.")
            place[prompt_id] = shard
            if scored.num_questions.get(prompt_id, 0) < settings.min_questions:
                counts.update(few_questions=1, too_few=-1)
                continue
            candidates = [scored.candidates[row] for row in rows]
            columns = {name: np.asarray(scored.columns[name])[rows] for name in weights}
            finite = np.logical_and.reduce([np.isfinite(column) for column in columns.values()])
            answered = np.array([(prompt_id, c) not in scored.unanswered for c in candidates])
            unanswered, nonfinite = int((~answered).sum()), int((answered & ~finite).sum())
            counts.update(unanswered=unanswered, nonfinite=nonfinite)
            kept = np.flatnonzero(answered & finite)
            if len(kept) < 2:
                continue
            columns = {name: column[kept] for name, column in columns.items()}
            total = combine(columns, weights, settings.normalize).tolist()
            limits = {key: settings[key] for key in ("strategy", "k", "min_margin", "max_pairs")}
            found, dropped = select(total, same(columns, weights), **limits)
            counts.update(dropped, pairs=len(found), too_few=-1)  # one that is none of the too few
            for order in found:
                ids = tuple(candidates[kept[i]] for i in order)
                choices.append(Choice(shard, prompt_id, ids, tuple(total[i] for i in order)))
    return choices, dict(counts)


def is_swapped(pair_id: str, seed: int, round_index: int) -> bool:
    """True for a random half of all pairs, whatever other pairs there are."""
    return not hashlib.sha256(f"{seed} {round_index} {pair_id}".encode()).digest()[0] % 2


def shuffle_labels(choices: Sequence[Choice], seed: int, round_index: int) -> list[Choice]:
    """A control: chosen and rejected change places in the half that `is_swapped`."""
    return [
        choice._replace(candidates=choice.candidates[::-1], scores=choice.scores[::-1])
        if is_swapped(choice.pair_id, seed, round_index)
        else choice
        for choice in choices
    ]
