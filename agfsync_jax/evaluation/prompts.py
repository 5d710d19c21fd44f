"""What an evaluation asks of the models: prompts that training never sees."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agfsync_jax.data import records
from agfsync_jax.data.questions import by_prompt
from agfsync_jax.prompt_sources import ask_questions, draw_prompts, normalized
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


def check_apart(held: Iterable[str], trained: Iterable[str]) -> None:
    """Raises ValueError for held-out prompts that are training's, but for case and spaces."""
    held, trained = list(held), set(map(normalized, trained))
    both = [prompt for prompt in held if normalized(prompt) in trained]
    if both:
        raise ValueError(
            f"{len(both)} of {len(held)} held-out prompts are among those that training draws, the"
            f" first is {both[0]!r}: name other prompts, or another split of them."
        )


def freeze(
    folder: Path, prompts: Mapping[str, dict], questions: Mapping[str, Sequence[dict]]
) -> None:
    """Writes what is asked to the folder `evals`, before the first image is there."""
    records.write_jsonl(folder / "prompts.jsonl", prompts.values())
    records.write_jsonl(folder / "questions.jsonl", itertools.chain(*questions.values()))


def check_frozen(
    folder: Path, prompts: Mapping[str, dict], questions: Mapping[str, Sequence[dict]]
) -> None:
    """Raises ValueError where `freeze` wrote other rows into the folder."""
    asked = list(itertools.chain(*questions.values()))
    for name, rows in (("prompts.jsonl", list(prompts.values())), ("questions.jsonl", asked)):
        path, rows = folder / name, json.loads(json.dumps(rows))  # as they are in a file
        if path.exists() and (before := records.read_jsonl(path)) != rows:
            pairs = itertools.zip_longest(before, rows)
            was, now = next((was, now) for was, now in pairs if was != now)
            raise ValueError(
                f"{path} has other rows than the config gives now; the first that differs was"
                f" {was!r:.200} and is {now!r:.200}. Images of both would be compared: put the"
                f" former file back, or remove {folder} to evaluate anew."
            )


def held_out_block(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of `config.evaluate`, what says which prompts."""
    others = ("num_seeds", "evaluators", "sample")
    return {key: value for key, value in spec.items() if key not in others}
