"""What can be told from the scores of candidates and the pairs made of them: numpy in, numpy out.

Values that are not finite have no say. A figure that nothing is known about is NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_ROUNDING = 1e-6  # scores are float32


class Spread(NamedTuple):
    """How far a score tells candidates apart.

    Attributes:
        overall: standard deviation of all candidates.
        within: of the candidates of a prompt, the mean over prompts with two or more.
    """

    overall: float
    within: float

    @property
    def share(self) -> float:
        """within / overall; NaN where all candidates have one score."""
        return self.within / self.overall if self.overall else np.nan


def center(prompts: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> np.ndarray:
    """Each value less the mean of its prompt's values, float [n]; `prompts` number the prompts."""
    known = np.isfinite(values)
    size = prompts.max(initial=-1) + 1
    count = np.bincount(prompts[known], minlength=size)
    mean = np.bincount(prompts[known], values[known], size) / np.maximum(count, 1)
    return np.where(known, values - mean[prompts], np.nan)


def spread(prompts: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]) -> Spread:
    """How much scores differ between all candidates, and between those of one prompt."""
    known = np.isfinite(values)
    if not known.any():
        return Spread(np.nan, np.nan)
    count = np.bincount(prompts[known])
    squares = np.bincount(prompts[known], center(prompts, values)[known] ** 2)
    several = count > 1
    stds = np.sqrt(squares[several] / count[several])
    overall = float(values[known].std())
    if overall <= _ROUNDING * np.abs(values[known]).max():
        return Spread(0.0, 0.0)
    return Spread(overall, float(stds.mean()) if several.any() else np.nan)


def correlations(
    columns: Sequence[Float[np.ndarray, " n"]], prompts: Int[np.ndarray, " n"] | None = None
) -> Float[np.ndarray, "c c"]:
    """Pearson's correlation of every two columns, over the candidates that have both scores.

    With `prompts`, of what is left of the scores when the mean of their prompt is taken away: a
    prompt that all scores find hard then says nothing.
    """
    found = np.full((len(columns), len(columns)), np.nan)
    for i, first in enumerate(columns):
        for j, second in enumerate(columns):
            both = np.isfinite(first) & np.isfinite(second)
            x, y = first[both], second[both]
            if prompts is not None:
                x, y = center(prompts[both], x), center(prompts[both], y)
            if len(x) > 1:
                x, y = _unit(x - x.mean(), first[both]), _unit(y - y.mean(), second[both])
                found[i, j] = x @ y
    return found


def _unit(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`x` with length 1; NaN where it is nothing but the rounding of `values`."""
    length = np.linalg.norm(x)
    return x / length if length > _ROUNDING * np.linalg.norm(values) else x * np.nan


def agreement(
    chosen: Float[np.ndarray, " m"], rejected: Float[np.ndarray, " m"]
) -> tuple[float, float, float]:
    """The shares of pairs whose chosen image has the higher, an equal and the lower raw score."""
    both = np.isfinite(chosen) & np.isfinite(rejected)
    if not both.any():
        return (np.nan,) * 3
    x, y = chosen[both], rejected[both]
    same = np.isclose(x, y, rtol=_ROUNDING, atol=0)
    return tuple(float(each.mean()) for each in (~same & (x > y), same, ~same & (x < y)))


class Wins(NamedTuple):
    """How often the candidate of one number is chosen.

    Attributes:
        chosen, rejected: pairs in which it is.
        prompts: distinct prompts of these pairs.
    """

    chosen: int
    rejected: int
    prompts: int

    @property
    def share(self) -> float:
        """Of its pairs, those in which it is chosen; one half where its number says nothing."""
        return self.chosen / max(self.chosen + self.rejected, 1)

    @property
    def is_biased(self) -> bool:
        """Far from one half: three standard errors, a prompt counting as one draw, and a tenth."""
        away = abs(self.share - 0.5)
        return away > max(0.1, 3 * 0.5 / max(self.prompts, 1) ** 0.5)


def wins(
    prompts: Int[np.ndarray, " m"], chosen: Int[np.ndarray, " m"], rejected: Int[np.ndarray, " m"]
) -> dict[int, Wins]:
    """Candidate number -> how it does, for each pair's prompt and its two candidates' numbers."""
    found = {}
    for candidate in np.unique([chosen, rejected]).tolist():
        won, lost = chosen == candidate, rejected == candidate
        count = len(np.unique(prompts[won | lost]))
        found[candidate] = Wins(int(won.sum()), int(lost.sum()), count)
    return found


def disagreement(
    differences: Float[np.ndarray, "c m"], spreads: Sequence[float]
) -> Float[np.ndarray, " m"]:
    """How much the columns contradict each other about each pair, 0 where none does.

    Args:
        differences: chosen less rejected, a row a column.
        spreads: a standard deviation a column, the unit of its row.

    Returns:
        the smaller of two numbers: how far the column most in favor of the chosen image is for
        it, and how far the one most against it is against it.
    """
    if not len(differences):
        return np.zeros(differences.shape[1])
    units = np.array([s if s > 0 else np.inf for s in spreads])
    scaled = np.nan_to_num(differences / units[:, None], posinf=0.0, neginf=0.0)
    return np.minimum(scaled.max(0).clip(min=0), (-scaled).max(0).clip(min=0))
