"""Images in, numbers out: a scorer a file. scoring/ takes the images through them."""

import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from agfsync_jax.data.columns import Column


class Scorer(Protocol):
    """What the class `Scorer` of each file here is; it derives from this one.

    It is made as `Scorer(mesh, *, batch_size, **spec)`. `config.scorers.<block>` names the file and
    holds the spec; what does not run in batches of a fixed size may ignore `batch_size`.

    Attributes:
        columns: what it makes. A single column is known by the name of its block, several by
            block/column.
        asks_questions: whether it reads the questions; then every prompt must have one.
        reads_prompt: whether the prompt matters to it.
    """

    columns: Mapping[str, Column]
    asks_questions: bool = False
    reads_prompt: bool = True
    _rest_goes_to: type | None = None  # the class that gets the settings that are not its own

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raises ValueError for settings that the scorer cannot do, before weights are read."""

    def __call__(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """Scores images of one size.

        Args:
            prompts: [b], what each image should show.
            questions: [b] lists of rows; see data/questions.py.

        Returns:
            the columns, float32 [b] each, NaN where there is no score; and from one that asks,
            "answers": for each image a list of dicts, one a question, with answer (None where
            there is none), p_yes, p_expected, correct and, if it was mapped to a choice, written.
        """


def settings_of(module: ModuleType) -> dict[str, inspect.Parameter]:
    """What `config.scorers.<block>` may set: the keyword arguments of a scorer, and of the classes
    that it hands on what it does not know itself (its bases, then its model)."""
    scorer = module.Scorer
    found: dict[str, inspect.Parameter] = {}
    for cls in (*scorer.__mro__, scorer._rest_goes_to):
        if cls is None or "__init__" not in vars(cls):
            continue
        own = inspect.signature(cls.__init__).parameters.values()
        keywords = [each for each in own if each.kind is each.KEYWORD_ONLY]
        found = {each.name: each for each in keywords} | found
        if not any(each.kind is each.VAR_KEYWORD for each in own):
            break
    return found
