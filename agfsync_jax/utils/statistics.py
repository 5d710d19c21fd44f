"""The bootstrap behind every error bar, and the figures of benchmarks."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

_CHUNK = 4_000_000  # counts of a resampling that are held at once
_KEPT = 1_000_000  # those of so few stay: the next metric of the same images draws them again


def bootstrap(
    values: np.ndarray, clusters: np.ndarray | None = None, num: int = 2000, seed: int = 0
) -> dict[str, float]:
    """The mean of `values` and its 95% percentile bootstrap interval.

    Images of one prompt are no independent draws, so whole clusters are resampled: `num` times,
    as many prompts as there are, with replacement, each with all its rows (Field and Welsh,
    "Bootstrapping clustered data", 2007). For a paired comparison pass differences.

    Args:
        values: [n] numbers.
        clusters: [n] labels, such as prompt ids; None makes every row its own cluster.
        num: resamples.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        {"mean", "low", "high"}.

    Raises:
        ValueError: no values, values that are not finite, or lengths that differ.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap needs a vector of at least one value, got {values.shape}")
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise ValueError(f"bootstrap got {bad} of {values.size} values that are not finite")
    labels = np.arange(values.size) if clusters is None else np.asarray(clusters)
    if labels.shape != values.shape:
        raise ValueError(f"bootstrap got {values.size} values and clusters of {labels.shape}")
    _, index = np.unique(labels, return_inverse=True)
    sums = np.bincount(index, weights=values)
    sizes = np.bincount(index).astype(np.float64)

    draw = _few_counts if sums.size * num <= _KEPT else _counts
    means = [(counts @ sums) / (counts @ sizes) for counts in draw(sums.size, num, seed)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def _counts(n: int, num: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n clusters appears in `num` resamples, [some, n] after [some, n].

    Resampling with replacement is a multinomial draw of that.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, num, chunk):
        yield rng.multinomial(n, np.full(n, 1.0 / n), size=min(chunk, num - start))


@functools.lru_cache(maxsize=16)
def _few_counts(n: int, num: int, seed: int) -> list[np.ndarray]:
    return list(_counts(n, num, seed))


def digits(interval: Mapping[str, float], least: int = 3) -> int:
    """Decimals of a difference, and of what it is between: `least`, or up to three more.

    So many that half the width of its interval is seen; of an interval without a width, its mean.
    """
    size = (interval["high"] - interval["low"]) / 2 or abs(interval["mean"])
    if not size > 0:  # nor NaN
        return least
    return min(max(least, math.ceil(-math.log10(size))), least + 3)


def format_interval(interval: dict[str, float], digits: int = 3, signed: bool = False) -> str:
    """ "0.512 [0.480, 0.544]"; with `signed`, "+0.031 [+0.010, +0.052]"."""
    sign = "+" if signed else ""
    mean, low, high = (
        "nan" if math.isnan(interval[key]) else format(interval[key], f"{sign}.{digits}f")
        for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows of a table as lines, whose columns stand below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def tifa(
    captions: Sequence[Any], element_types: Sequence[str], correct: Sequence[bool]
) -> dict[str, Any]:
    """TIFA's figures of answered questions (Hu et al. 2023, tifascore/tifa_score.py).

    Args:
        captions: [n], what the question is about: the share of right answers is taken within a
            caption (an image), then the mean over captions.
        element_types: [n], what it asks for.
        correct: [n].

    Returns:
        {"tifa_average", "tifa_stdev", "accuracy_by_type": {element type: share of all answers}};
        the standard deviation is the sample's, nan of a single caption.
    """
    right = np.asarray(correct, np.float64)
    _, index = np.unique(np.asarray(captions), return_inverse=True)
    by_caption = np.bincount(index, right) / np.bincount(index)
    types, index = np.unique(np.asarray(element_types), return_inverse=True)
    by_type = np.bincount(index, right) / np.bincount(index)
    stdev = by_caption.std(ddof=1) if len(by_caption) > 1 else np.nan
    return {
        "tifa_average": float(by_caption.mean()),
        "tifa_stdev": float(stdev),
        "accuracy_by_type": dict(zip(types.tolist(), by_type.tolist(), strict=True)),
    }
