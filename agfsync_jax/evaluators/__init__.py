"""Judges that only look, a file each: none here ever has a say in pairs or training."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from agfsync_jax.data.columns import Column


class Evaluator(Protocol):
    """What the class `Evaluator` of each file here is; it derives from this one.

    It is made without arguments; `config.evaluate.evaluators` names the files.

    Attributes:
        columns: what it makes; "a/b" is a part of "a", such as one kind of check.
    """

    columns: Mapping[str, Column]

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for prompts of which it cannot judge pictures."""

    def __call__(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping[str, Any]]],
    ) -> dict[str, Float[np.ndarray, " b"]]:
        """The columns for images of one size, prompts [b] and [b] lists of question rows.

        Finite numbers, but NaN where a part does not apply to a prompt.
        """
