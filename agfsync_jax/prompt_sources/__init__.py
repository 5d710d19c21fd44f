"""Where prompts and questions come from, a source a file; and here how their rows come in.

What a source gives is checked here and nowhere else.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from agfsync_jax.data import questions
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage

PROMPT_FIELDS = ("id", "prompt", "category", "source")
PROVENANCE = ("model", "request", "wave")  # that a row may have besides


@dataclasses.dataclass
class Desk:
    """Where a source works that has its rows made by others, and takes long."""

    folder: Path  #: what it asks, and what comes back; lasts
    stage: Stage  #: the clock and progress
    offline: bool = False  #: nothing is asked from here, requests are only written
    #: Prompts that new ones must be apart from, and what they are.
    apart: Mapping[str, str] = dataclasses.field(default_factory=dict)


class PromptSource(Protocol):
    """What each file here is: a module with these two functions.

    `spec` is what else stands in the config's block, which names the file as `source`. Rows depend
    on the arguments alone; each round gets other prompts, and two splits never share one.

    A source that has its rows made by others, such as a language model, takes a `desk` too. It may
    give fewer prompts than asked for, and no question about some of them. `check(**spec)`, if it is
    there, raises ValueError for settings that cannot be.
    """

    def prompts(
        self, num_prompts: int, *, split: str, seed: int, round_index: int, **spec: Any
    ) -> list[dict]:
        """`num_prompts` rows with `PROMPT_FIELDS`, each with an id of its own; 0: all there are."""

    def questions(self, prompt_rows: list[dict], *, seed: int, **spec: Any) -> list[dict]:
        """Rows with the fields of data/questions.py, each under its prompt's id."""


def takes_long(spec: Mapping[str, Any], function: str) -> bool:
    """Whether the source that a block names has its "prompts" or its "questions" made at a desk."""
    source = modules.load("prompt_sources", spec["source"])
    return "desk" in inspect.signature(getattr(source, function)).parameters


def settings_of(source: ModuleType) -> dict[str, inspect.Parameter]:
    """What the blocks of the config that name a source may set besides, by parameter."""
    given = {"seed", "round_index", "prompt_rows", "desk"}
    return {
        name: parameter
        for function in (source.questions, source.prompts)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in given
    }


def draw_prompts(
    spec: Mapping[str, Any], *, seed: int, round_index: int, desk: Desk | None = None
) -> list[dict]:
    """The prompts of a block of the config that names a source.

    Args:
        desk: of a source that takes long.

    Raises:
        ValueError: no such source, or rows other than `PromptSource` promises.
    """
    source, arguments = _source(spec)
    at = {"desk": desk} if takes_long(spec, "prompts") else {}
    rows = source.prompts(**arguments, seed=seed, round_index=round_index, **at)
    ids, number = {row["id"] for row in rows}, spec["num_prompts"]
    few = number not in (0, len(rows)) and not (at and len(rows) < number)
    if not rows or len(ids) < len(rows) or few:
        raise ValueError(
            f"prompt source {spec['source']!r} gave {len(rows)} rows with {len(ids)} ids:"
            f" expected {number} rows, each with its own id."
        )
    fields = (*PROMPT_FIELDS, *PROVENANCE)
    return [{field: row[field] for field in fields if field in row} for row in rows]


def ask_questions(
    spec: Mapping[str, Any], prompt_rows: list[dict], *, seed: int, desk: Desk | None = None
) -> list[dict]:
    """The questions about the prompts, from the source that a block of the config names.

    Args:
        desk: of a source that takes long. It may leave prompts without a question.

    Raises:
        ValueError: no such source, a question that cannot be asked, or a prompt without one.
    """
    source, arguments = _source(spec)
    at = {"desk": desk} if takes_long(spec, "questions") else {}
    rows = source.questions(prompt_rows, **arguments, seed=seed, **at)
    asked = {row["id"] for row in rows}
    questions.check([row for row in prompt_rows if not at or row["id"] in asked], rows)
    fields = (*questions.FIELDS, *questions.OPTIONAL)
    return [{field: row[field] for field in fields if field in row} for row in rows]


def normalized(prompt: str) -> str:
    """Prompts that differ in case or spaces alone are one prompt."""
    return " ".join(prompt.casefold().split())


def prompt_id(split: str, round_index: int, index: int) -> str:
    """A stable name: "r000-00012" in training, "test-r000-00012" in another split."""
    prefix = "" if split == "train" else f"{split}-"
    return f"{prefix}r{round_index:03d}-{index:05d}"


def _source(spec: Mapping[str, Any]) -> tuple[PromptSource, dict[str, Any]]:
    """The file that a block names, and the arguments that it is called with."""
    arguments = {key: value for key, value in spec.items() if key != "source"}
    return modules.load("prompt_sources", spec["source"]), arguments
