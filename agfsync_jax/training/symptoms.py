"""What the metrics of a training say of it, in words, while there is time to do something."""

from collections import deque
from collections.abc import Mapping

import numpy as np

WINDOW = 50  # logged steps, of a moving mean
_SATURATED = 0.05  # of what a pair counts at the start, 1/2
_SEEN = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/weight")


class Symptoms:
    """Looks at a training's metrics, step by step. Losses without rewards have no symptoms."""

    def __init__(self):
        self._rows = deque(maxlen=2 * WINDOW)
        self._told = False

    def see(self, values: Mapping[str, float]) -> str:
        """Takes a step's metrics; returns what is to be told now, once in a training, or ""."""
        if not all(name in values for name in _SEEN):
            return ""
        self._rows.append([values[name] for name in _SEEN])
        if self._told or len(self._rows) < 2 * WINDOW:
            return ""
        rows = np.array(self._rows)
        before, now = rows[:WINDOW].mean(axis=0), rows[WINDOW:].mean(axis=0)
        sides, falls = now[:2], now < before
        if not ((sides < 0).all() and falls[:2].all() and not falls[2]):
            return ""
        self._told = True
        return (
            f"the policy gets worse at both images: chosen reward {sides[0]:.2g}, rejected"
            f" {sides[1]:.2g}, in the mean of {WINDOW} steps, and falling. That is common for"
            " Diffusion-DPO, and may ruin pictures: watch them (config.train.validate_every). What"
            " helps: a lower config.train.learning_rate, config.loss.diffusion_dpo.anchor=1, or"
            " config.loss.name=mapo"
        )

    @property
    def is_saturated(self) -> bool:
        """Whether the last steps' pairs are told apart so well that next to nothing is learned."""
        rows = list(self._rows)[-WINDOW:]
        return len(rows) == WINDOW and bool(np.mean([row[3] for row in rows]) < _SATURATED)
