"""What an evaluation asks of the models: prompts that training never sees."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agfsync_jax.data import records
from agfsync_jax.data.questions import by_prompt
from agfsync_jax.data.scores import scored_round
from agfsync_jax.data.shards import read_rows
from agfsync_jax.prompt_sources import ask_questions, draw_prompts, normalized, takes_long
from agfsync_jax.scoring.columns import asks_questions
from agfsync_jax.utils import modules

HELD_OUT = 300  # prompts that a language model writes, where their number is not said


def held_out(config: Any, workdir: Path) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Prompt rows and question rows by prompt id; the same in every round.

    Raises:
        ValueError: no such source, or rows that are not as prompt_sources/ promises.
        FileNotFoundError: a language model writes them, and has not yet.
    """
    rows = held_out_prompts(config, workdir)
    asked = []
    if asks_questions(config.scorers):
        spec = config.questions.to_dict()
        if takes_long(spec, "questions"):
            asked = read_rows(_found(config, workdir, "questions.jsonl"), "questions")
            known = {row["id"] for row in asked}
            rows = [row for row in rows if row["id"] in known]
        else:
            asked = ask_questions(spec, rows, seed=config.seed)
    return {row["id"]: row for row in rows}, by_prompt(asked)


def held_out_prompts(config: Any, workdir: Path) -> list[dict]:
    """The rows of the prompts alone; see `held_out`."""
    spec = held_out_block(config)
    if not takes_long(spec, "prompts"):
        return draw_prompts(spec, seed=config.seed, round_index=0)
    path = _found(config, workdir, "prompts.jsonl")
    rows = read_rows(path, "prompts")
    if len(rows) > spec["num_prompts"]:
        raise ValueError(
            f"{path} has {len(rows)} held-out prompts, and config.evaluate.num_prompts is"
            f" {spec['num_prompts']}: set it to {len(rows)}, or remove {path.parent}."
        )
    return rows


def is_made(config: Any, workdir: Path | None) -> bool:
    """Whether what is held out can be read, or drawn at once."""
    if workdir is None:
        return not any(_waits_for(config))
    try:
        for name in _waits_for(config):
            _found(config, workdir, name)
    except FileNotFoundError:
        return False
    return True


def num_held_out(config: Any) -> int:
    """How many prompts `held_out` has; of those that a language model writes, how many it will."""
    spec = held_out_block(config)
    if takes_long(spec, "prompts"):
        return spec["num_prompts"]
    return len(draw_prompts(spec, seed=config.seed, round_index=0))


def held_out_folder(workdir: Path) -> Path:
    """Where what a language model writes for evaluations lies."""
    return workdir / "round_000" / "heldout"


def _waits_for(config: Any) -> list[str]:
    """What a language model writes for evaluations, and the file that holds it."""
    files = []
    if takes_long(held_out_block(config), "prompts"):
        files.append("prompts.jsonl")
    if asks_questions(config.scorers) and takes_long(config.questions.to_dict(), "questions"):
        files.append("questions.jsonl")
    return files


def _found(config: Any, workdir: Path, name: str) -> Path:
    """A file of what is held out, in this workdir or in the one that pairs are made from."""
    own = held_out_folder(workdir) / name
    places = [own]
    if config.pair.path and (scored := scored_round(config.pair.path, own)):
        places.append(held_out_folder(scored.parent) / name)
    for path in places:
        if path.exists():
            return path
    verb = name.removesuffix(".jsonl")
    raise FileNotFoundError(f"{own} is not there: run `agfsync {verb}` first.")


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


def held_out_block(config: Any) -> dict[str, Any]:
    """Of `config.evaluate`, what says which prompts; where it names no source, that of
    `config.prompts` with what else stands there."""
    others = ("num_seeds", "evaluators", "sample")
    spec = {key: value for key, value in config.evaluate.to_dict().items() if key not in others}
    if not spec["source"]:
        base = config.prompts.to_dict()
        known = modules.settings("prompt_sources", base["source"])
        spec = base | {key: value for key, value in spec.items() if key in known}
    if takes_long(spec, "prompts"):
        spec["split"] = "heldout" if spec["split"] in ("all", "train") else spec["split"]
        spec["num_prompts"] = spec["num_prompts"] or HELD_OUT
    return spec
