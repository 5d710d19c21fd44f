"""Where prompts and questions come from, a source a file; and here how their rows come in.

What a source gives is checked here and nowhere else.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from agfsync_jax.data import questions
from agfsync_jax.utils import modules

PROMPT_FIELDS = ("id", "prompt", "category", "source")


class PromptSource(Protocol):
    """What each file here is: a module with these two functions.

    `spec` is what else stands in the config's block, which names the file as `source`. Rows depend
    on the arguments alone; each round gets other prompts, and two splits never share one.
    """

    def prompts(
        self, num_prompts: int, *, split: str, seed: int, round_index: int, **spec: Any
    ) -> list[dict]:
        """`num_prompts` rows with `PROMPT_FIELDS`, each with an id of its own; 0: all there are."""

    def questions(self, prompt_rows: list[dict], *, seed: int, **spec: Any) -> list[dict]:
        """Rows with the fields of data/questions.py, each under its prompt's id."""


def draw_prompts(spec: Mapping[str, Any], *, seed: int, round_index: int) -> list[dict]:
    """The prompts of a block of the config that names a source.

    Raises:
        ValueError: no such source, or rows other than `PromptSource` promises.
    """
    source, arguments = _source(spec)
    rows = source.prompts(**arguments, seed=seed, round_index=round_index)
    ids = {row["id"] for row in rows}
    if not rows or len(ids) < len(rows) or spec["num_prompts"] not in (0, len(rows)):
        raise ValueError(
            f"prompt source {spec['source']!r} gave {len(rows)} rows with {len(ids)} ids:"
            f" expected {spec['num_prompts']} rows, each with its own id."
        )
    return [{field: row[field] for field in PROMPT_FIELDS} for row in rows]


def ask_questions(spec: Mapping[str, Any], prompt_rows: list[dict], *, seed: int) -> list[dict]:
    """The questions about the prompts, from the source that a block of the config names.

    Raises:
        ValueError: no such source, a question that cannot be asked, or a prompt without one.
    """
    source, arguments = _source(spec)
    rows = source.questions(prompt_rows, **arguments, seed=seed)
    questions.check(prompt_rows, rows)
    return [{field: row[field] for field in questions.FIELDS} for row in rows]


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
