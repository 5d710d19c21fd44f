"""Scores to preferences: which of a prompt's candidates is chosen, and which is rejected.

Pure functions of numpy arrays: no images, no files, nothing drawn at random but `shuffle_labels`.
"""

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

NORMALIZATIONS = ("none", "zscore", "rank", "minmax")
STRATEGIES = ("best_worst", "all_above_margin")
# What pair.json counts: pairs kept and prompts there were; pairs dropped as ties, for their margin
# and by the limit; candidates with a score that is not finite; prompts with fewer than two others.
COUNTS = ("pairs", "prompts", "ties", "margin", "limit", "nonfinite", "too_few")
# Scores are float32: values that differ by less are one value, or zscore would blow noise up.
_ROUNDING = 1e-6


class Choice(NamedTuple):
    """A pair before its images are looked up."""

    shard: str
    prompt_id: str
    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float

    @property
    def pair_id(self) -> str:
        """The same, whichever of the two is chosen."""
        return f"{self.prompt_id}-{min(self[2:4])}-{max(self[2:4])}"


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
    if method == "minmax":
        return (x - x.min()) / spread
    raise ValueError(f"config.pair.normalize={method!r}: expected {' | '.join(NORMALIZATIONS)}.")


def combine(columns: dict[str, np.ndarray], weights: dict[str, float], method: str) -> np.ndarray:
    """The weighted sum of the normalized columns, [n]; columns without a weight have no say."""
    return sum(weight * normalize(columns[name], method) for name, weight in weights.items())


def same(columns: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """bool [n, n]: which candidates have the same raw scores in every column that has a weight."""
    weighted = [columns[name] for name in weights]
    close = [np.isclose(x[:, None], x[None, :], rtol=_ROUNDING, atol=0) for x in weighted]
    return np.logical_and.reduce(close)


def select(
    scores: Sequence[float],
    tied: np.ndarray,
    *,
    strategy: str,
    min_margin: float = 0.0,
    max_pairs: int = 0,
) -> tuple[list[tuple[int, int]], Counter]:
    """Picks (chosen, rejected) among one prompt's candidates.

    best_worst: the highest score against the lowest. all_above_margin: every pair of candidates,
    the largest margins first, at most `max_pairs` of them (0: no limit). Of equal scores the first
    candidate counts as the higher.

    Args:
        scores: [n], finite, n >= 2.
        tied: bool [n, n], candidates between which there is nothing to prefer.

    Returns:
        the pairs, and how many were dropped as "ties", for their "margin", and by the "limit".
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable
    if strategy == "best_worst":
        pairs = [(order[0], min(order[1:], key=lambda i: scores[i]))]
    elif strategy == "all_above_margin":
        pairs = sorted(
            itertools.combinations(order, 2), key=lambda pair: scores[pair[1]] - scores[pair[0]]
        )
    else:
        raise ValueError(f"config.pair.strategy={strategy!r}: expected {' | '.join(STRATEGIES)}.")
    kept, dropped = [], Counter()
    for chosen, rejected in pairs:
        margin = scores[chosen] - scores[rejected]
        if tied[chosen, rejected] or margin <= 0:
            dropped["ties"] += 1
        elif margin < min_margin:
            dropped["margin"] += 1
        elif max_pairs and len(kept) == max_pairs:
            dropped["limit"] += 1
        else:
            kept.append((chosen, rejected))
    return kept, dropped


def check_settings(settings) -> None:
    """Raises ValueError for a `config.pair` that cannot be followed."""
    for key, allowed in (("normalize", NORMALIZATIONS), ("strategy", STRATEGIES)):
        if settings[key] not in allowed:
            raise ValueError(
                f"config.pair.{key}={settings[key]!r}: expected {' | '.join(allowed)}."
            )
    weights = settings.weights.to_dict()
    if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
        raise ValueError(f"config.pair.weights={weights}: expected numbers, one at least not 0.")
    for key in ("min_margin", "max_pairs"):
        if not settings[key] >= 0:
            raise ValueError(f"config.pair.{key}={settings[key]}: expected 0 or more.")


def choose(
    scores: Mapping[str, Sequence[Mapping]], prompts: Mapping[str, str], settings
) -> tuple[list[Choice], dict[str, int]]:
    """Picks the pairs of all prompts.

    Args:
        scores: shard -> its rows {prompt_id, candidate, one key a column}.
        prompts: prompt id -> text.
        settings: `config.pair`.

    Returns:
        the pairs in the order of the scores, and the numbers that `COUNTS` names.

    Raises:
        ValueError: a column that has a weight and is not there; a prompt that is not listed, or
            whose candidates lie in two shards.
    """
    weights = {name: weight for name, weight in settings.weights.items() if weight}
    counts = Counter(dict.fromkeys(COUNTS, 0), prompts=len(prompts), too_few=len(prompts))
    choices, place = [], {}
    for shard, rows in scores.items():
        groups = defaultdict(list)
        for row in rows:
            groups[row["prompt_id"]].append(row)
        for prompt_id, group in groups.items():
            if prompt_id not in prompts or prompt_id in place:
                why = f"is in {place[prompt_id]} too" if prompt_id in place else "is not listed"
                raise ValueError(f"scores of shard {shard}: prompt {prompt_id!r} {why}.")
            place[prompt_id] = shard
            if missing := [name for name in weights if name not in group[0]]:
                raise ValueError(
                    f"scores of shard {shard} have no column {missing[0]!r}, which"
                    f" config.pair.weights names; they have {', '.join(group[0])}."
                )
            found, counted = _choose_in_prompt(group, weights, settings)
            counts.update(counted)
            choices += [Choice(shard, prompt_id, *pair) for pair in found]
    return choices, dict(counts)


def _choose_in_prompt(
    rows: Sequence[Mapping], weights: Mapping[str, float], settings
) -> tuple[list[tuple[int, int, float, float]], Counter]:
    """(chosen, rejected, chosen score, rejected score) of each pair, and what to add to counts."""
    columns = {name: np.array([row[name] for row in rows], np.float64) for name in weights}
    finite = np.logical_and.reduce([np.isfinite(column) for column in columns.values()])
    counts = Counter(nonfinite=int((~finite).sum()))
    if finite.sum() < 2:
        return [], counts
    columns = {name: column[finite] for name, column in columns.items()}
    candidates = [row["candidate"] for row, kept in zip(rows, finite, strict=True) if kept]
    total = combine(columns, weights, settings.normalize).tolist()
    pairs, dropped = select(
        total,
        same(columns, weights),
        strategy=settings.strategy,
        min_margin=settings.min_margin,
        max_pairs=settings.max_pairs,
    )
    counts.update(dropped, pairs=len(pairs), too_few=-1)  # one that is none of the too few
    return [(candidates[i], candidates[j], total[i], total[j]) for i, j in pairs], counts


def shuffle_labels(choices: Sequence[Choice], seed: int, round_index: int) -> list[Choice]:
    """A control: chosen and rejected change places in a random half of the pairs.

    Which half follows from (seed, round, pair), whatever other pairs there are.
    """

    def shuffled(choice: Choice) -> Choice:
        digest = hashlib.sha256(f"{seed} {round_index} {choice.pair_id}".encode()).digest()
        if digest[0] % 2:
            return choice
        return choice._replace(
            chosen=choice.rejected,
            rejected=choice.chosen,
            chosen_score=choice.rejected_score,
            rejected_score=choice.chosen_score,
        )

    return [shuffled(choice) for choice in choices]
