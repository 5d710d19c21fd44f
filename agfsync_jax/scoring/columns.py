"""What the scorers and evaluators of a config say of themselves, before any is loaded."""

from collections.abc import Mapping
from typing import Any

from agfsync_jax.data.columns import Column
from agfsync_jax.scorers import Scorer
from agfsync_jax.utils import modules


def scorer_class(block: str, spec: Mapping[str, Any]) -> type[Scorer]:
    """The class that the block `config.scorers.<block>` names."""
    if "name" not in spec:
        raise ValueError(f"config.scorers.{block} has no name: which file of scorers is it?")
    return modules.load("scorers", spec["name"]).Scorer


def asks_questions(specs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any scorer of `config.scorers` reads the questions."""
    return any(scorer_class(block, spec).asks_questions for block, spec in specs.items())


def named(block: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer's columns under the names that they have in scores/."""
    if len(columns) == 1:
        (value,) = columns.values()
        return {block: value}
    return {f"{block}/{name}": value for name, value in columns.items()}


def columns_of(config: Any) -> dict[str, Column]:
    """The columns that an evaluation makes, those that say the most of the prompt first.

    The evaluators' in the config's order; of scorers, whose order a ConfigDict forgets, those that
    ask questions, then those that read the prompt, then the others.
    """
    found: dict[str, Column] = {}
    for name in config.evaluate.evaluators:
        found |= modules.load("evaluators", name).Evaluator.columns
    scorers = {block: scorer_class(block, spec) for block, spec in config.scorers.items()}
    for block in sorted(
        scorers,
        key=lambda block: (not scorers[block].asks_questions, not scorers[block].reads_prompt),
    ):
        found |= named(block, scorers[block].columns)
    return found


def check_weights(weights: Mapping[str, float], specs: Mapping[str, Any]) -> None:
    """Raises ValueError unless each weight names a column that the scorers will make."""
    unknown = [name for name in weights if name.split("/")[0] not in specs]
    if unknown:
        raise ValueError(
            f"config.pair.weights names {', '.join(map(repr, unknown))}, which no scorer makes:"
            f" config.scorers has {', '.join(map(repr, specs)) or 'none'}."
        )
