"""What an evaluation asks of the models: prompts that training never sees."""

from collections.abc import Mapping
from typing import Any

from agfsync_jax.data.questions import by_prompt
from agfsync_jax.prompt_sources import ask_questions, draw_prompts
from agfsync_jax.scoring.columns import asks_questions


def held_out(config: Any) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Prompt rows and question rows by prompt id; the same in every round.

    Raises:
        ValueError: no such source, or rows that are not as prompt_sources/ promises.
    """
    spec = held_out_block(config.evaluate.to_dict())
    rows = draw_prompts(spec, seed=config.seed, round_index=0)
    asked = []
    if asks_questions(config.scorers):
        asked = ask_questions(config.questions.to_dict(), rows, seed=config.seed)
    return {row["id"]: row for row in rows}, by_prompt(asked)


def held_out_block(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of `config.evaluate`, what says which prompts."""
    return {key: value for key, value in spec.items() if key not in ("num_seeds", "evaluators")}
