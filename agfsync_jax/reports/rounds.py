"""What rounds have left in a workdir, read back as plain data."""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS, Column
from agfsync_jax.data.pairs import read_features, read_pairs
from agfsync_jax.reports.formats import describe, with_digits
from agfsync_jax.utils.clock import read_stages
from agfsync_jax.utils.files import absolute, date_of
from agfsync_jax.utils.metrics import read_metrics

# What a round leaves, and the verb that makes it.
PARTS = {
    "prompts.jsonl": "prompts",
    "candidates": "sample",
    "scores": "score",
    "pairs": "pair",
    "checkpoints": "train",
    "evals/comparison.json": "evaluate",
}


@dataclasses.dataclass
class Round:
    """All that a report needs of a round but images; parts that are not there yet are empty.

    Columns have intervals, {"mean", "low", "high"}.
    """

    folder: Path
    label: str  # round 0
    base_evals: Path  # where the base model's images are
    stages: dict[str, dict[str, float]]  # verb -> seconds, items, items_per_second
    counts: dict[str, int]  # pair.json
    has_pairs: bool
    curve: list[dict[str, float]]  # training's metrics, a row a step that was logged
    prompts: dict[str, dict]  # id -> row, of the held-out ones
    base: dict[str, dict]  # column -> interval, as the next three
    tuned: dict[str, dict]
    delta: dict[str, dict]
    win_rate: dict[str, dict]
    rows: dict[str, list[dict]]  # base, tuned -> score rows
    answers: dict[str, list[dict]]  # base, tuned -> rows of answers
    missing: list[str]  # parts that are not there yet, each with the verb that makes it


@dataclasses.dataclass
class Report:
    """A workdir."""

    name: str  # of its folder
    rounds: list[Round]  # one at least
    columns: dict[str, Column]  # of the scores of base and tuned, in the order to show
    judges: Sequence[str]  # those that have no say in pairs
    settings: str  # the text of config.json, or ""
    device: str
    versions: Mapping[str, str]
    examples: dict[str, list[dict]] = dataclasses.field(default_factory=dict)  # of examples.py
    gallery: Any = None  # a candidates.Gallery, of the last round that has pairs

    @functools.cached_property
    def judged(self) -> list[Round]:
        """The rounds with an evaluation."""
        return [each for each in self.rounds if each.delta]

    @property
    def last(self) -> Round:
        """The last round, of those with an evaluation if there are any."""
        return (self.judged or self.rounds)[-1]

    @functools.cached_property
    def yes_or_no(self) -> set[str]:
        """Columns whose scores are all 0 or 1: of one image, or spread out, they say little."""
        return {
            name
            for name in self.columns
            if {row.get(name, 0) for rows in self.last.rows.values() for row in rows} <= {0, 1}
        }

    @property
    def facts(self) -> list[str]:
        """What stands at the top: workdir, model, date, rounds and steps, device."""
        model = json.loads(self.settings or "{}").get("backbone", {}).get("path", "")
        done = [each.folder / "stages.json" for each in self.rounds if each.stages]
        date = date_of(done[-1]).isoformat() if done else ""
        length = "1 round" if len(self.rounds) == 1 else f"{len(self.rounds)} rounds"
        if steps := [int(each.curve[-1]["step"]) for each in self.rounds if each.curve]:
            length += f" of {steps[-1]:,} training steps"
        return [fact for fact in (self.name, model, date, length, self.device) if fact]


def read_report(
    workdir: Path, columns: Mapping[str, Column], judges: Sequence[str], **environment
) -> Report:
    """Reads all rounds, but no images.

    Args:
        columns: what is known of columns, in the order to show.
        judges: columns that have no say in pairs.
        **environment: device and versions.

    Raises:
        FileNotFoundError: no round there.
    """
    folders = sorted(workdir.glob("round_[0-9][0-9][0-9]"))
    if not folders:
        raise FileNotFoundError(f"no round_000 in {workdir}; `agfsync run` or a verb makes it")
    rounds = [_read_round(folder, folders[0] / "evals", columns) for folder in folders]
    found = describe({name for each in rounds for name in each.delta}, columns)
    for each in rounds:
        found |= {name: with_digits(found[name], delta) for name, delta in each.delta.items()}
    settings = workdir / "config.json"  # has no secrets
    return Report(
        name=absolute(workdir).name,
        rounds=rounds,
        columns=found,
        judges=[name for name in judges if name in found],
        settings=settings.read_text() if settings.exists() else "",
        **environment,
    )


def _read_round(folder: Path, base_evals: Path, columns: Mapping[str, Column]) -> Round:
    def parquet(path: Path) -> list[dict]:
        return records.read_parquet(path) if path.exists() else []

    def jsonl(path: Path) -> list[dict]:
        return records.read_jsonl(path) if path.exists() else []

    def ordered(values: dict) -> dict:
        return {name: values[name] for name in describe(values, columns)}

    evals = folder / "evals"
    comparison = parsed(evals / "comparison.json")
    return Round(
        folder=folder,
        label=label_of(folder),
        base_evals=base_evals,
        stages=read_stages(folder / "stages.json"),
        counts=parsed(folder / "pair.json"),
        has_pairs=(folder / "pairs" / "dataset_info.json").exists(),
        curve=read_metrics(folder / "checkpoints" / "metrics.jsonl"),
        prompts={row["id"]: row for row in jsonl(evals / "prompts.jsonl")},
        base=ordered(parsed(evals / "base.json")),
        tuned=ordered(parsed(evals / "tuned.json")),
        delta=ordered(comparison.get("delta", {})),
        win_rate=ordered(comparison.get("win_rate", {})),
        rows={name: parquet(evals / f"{name}-rows.parquet") for name in ("base", "tuned")},
        answers={name: parquet(evals / f"{name}-answers.parquet") for name in ("base", "tuned")},
        missing=[f"{p} (agfsync {v})" for p, v in PARTS.items() if not (folder / p).exists()],
    )


def label_of(folder: Path) -> str:
    """ "round 0"."""
    return f"round {int(folder.name.removeprefix('round_'))}"


def parsed(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def pair_columns(pairs: Path) -> dict[str, Sequence]:
    """What tells of pairs, one entry a pair each; of a ranking the best against the worst."""
    always = ("pair_id", "prompt_id", "prompt", "margin")
    sides = [f"{side}_{what}" for what in ("candidate", "score") for side in ("chosen", "rejected")]
    if "candidates" not in read_features(pairs):
        return read_pairs(pairs, (*always, *sides))
    found = read_pairs(pairs, (*always, "candidates", "scores"))
    for name, column in (("candidate", found["candidates"]), ("score", found["scores"])):
        for side, place in (("chosen", 0), ("rejected", -1)):
            found[f"{side}_{name}"] = np.array([values[place] for values in column])
    return found


def read_scored(folder: Path, columns: Mapping[str, Column]) -> SimpleNamespace:
    """The scores of a round, one entry a candidate; nothing where there are none.

    Returns:
        numbers: prompt_id -> 0, 1, 2, ...
        shards: prompt_id -> name of its shard.
        rows: (prompt_id, candidate) -> its place in what follows.
        prompts, candidates: int [n], the prompt by its number.
        scores: {name: float64 [n]}, NaN where there is no score.

    Raises:
        ValueError: shards with different columns.
    """
    numbers, shards, rows, prompts = {}, {}, {}, []
    scores = defaultdict(list)
    for path in sorted((folder / "scores").glob("[0-9]*.parquet")):
        table = records.read_table(path)
        for key in zip(*(table[name].to_pylist() for name in KEYS), strict=True):
            rows[key] = len(rows)
            shards[key[0]] = path.stem
            prompts.append(numbers.setdefault(key[0], len(numbers)))
        names = set(table.column_names) - set(KEYS)
        if scores and names != set(scores):
            raise ValueError(
                f"{path} has the columns {', '.join(sorted(names))}, the shards before it have"
                f" {', '.join(sorted(scores))}: remove the stale ones and run `agfsync score`."
            )
        for name in names:
            scores[name].append(np.asarray(table[name].to_numpy(), np.float64))
    return SimpleNamespace(
        numbers=numbers,
        shards=shards,
        rows=rows,
        prompts=np.array(prompts, int),
        candidates=np.array([candidate for _, candidate in rows], int),
        scores={name: np.concatenate(scores[name]) for name in describe(scores, columns)},
    )


def scores_at(scored: SimpleNamespace, key: tuple[str, int]) -> dict[str, float]:
    """The scores of (prompt_id, candidate) in what `read_scored` gives; {} where it has none."""
    if key not in scored.rows:
        return {}
    return {name: float(column[scored.rows[key]]) for name, column in scored.scores.items()}
