"""What rounds have left in a workdir, read back as plain data."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS, Column
from agfsync_jax.data.pairs import is_pairs
from agfsync_jax.data.scores import scored_round
from agfsync_jax.reports.formats import describe, with_digits
from agfsync_jax.utils.clock import read_stages
from agfsync_jax.utils.files import absolute, date_of, read_json
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
# What a language model writes, and where in a round's folder.
WRITTEN = {
    "prompts": "prompts",
    "questions": "questions",
    "held-out prompts": "heldout/prompts",
    "questions about them": "heldout/questions",
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
    counts: dict[str, Any]  # pair.json
    has_pairs: bool
    draws: bool  # whether it is known which prompts it learns from; of people's pairs it is not
    curve: list[dict[str, float]]  # training's metrics, a row a step that was logged
    prompts: dict[str, dict]  # id -> row, of the held-out ones
    base: dict[str, dict]  # column -> interval, as the next three
    tuned: dict[str, dict]
    delta: dict[str, dict]
    win_rate: dict[str, dict]
    rows: dict[str, list[dict]]  # base, tuned -> score rows
    answers: dict[str, list[dict]]  # base, tuned -> rows of answers
    written: dict[str, dict]  # what a language model wrote -> what became of it, see llm/filters.py
    missing: list[str]  # parts that are not there yet, each with the verb that makes it

    def images(self) -> dict[tuple[str, int], tuple[dict, dict]]:
        """(prompt_id, candidate) -> its score rows of base and tuned, in order of the keys."""
        base, tuned = (
            {tuple(row[name] for name in KEYS): row for row in self.rows[model]}
            for model in ("base", "tuned")
        )
        return {key: (base[key], tuned[key]) for key in sorted(base.keys() & tuned.keys())}


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
    settings = read_json(workdir / "config.json")  # has no secrets
    pairs = settings.get("pair", {}).get("path", "")
    rounds = [_read_round(folder, folders[0] / "evals", columns, pairs) for folder in folders]
    found = describe({name for each in rounds for name in each.delta}, columns)
    for each in rounds:
        found |= {name: with_digits(found[name], delta) for name, delta in each.delta.items()}
    return Report(
        name=absolute(workdir).name,
        rounds=rounds,
        columns=found,
        judges=[name for name in judges if name in found],
        settings=json.dumps(settings, indent=2) if settings else "",
        **environment,
    )


def _read_round(folder: Path, base_evals: Path, columns: Mapping[str, Column], pairs: str) -> Round:
    def rows(name: str) -> list[dict]:
        path = folder / "evals" / name
        read = records.read_jsonl if path.suffix == ".jsonl" else records.read_parquet
        return read(path) if path.exists() else []

    means = {name: read_json(folder / "evals" / f"{name}.json") for name in ("base", "tuned")}
    compared = read_json(folder / "evals" / "comparison.json")
    intervals = {"delta": {}, "win_rate": {}} | means | compared
    found = {
        part: {name: intervals[part][name] for name in describe(intervals[part], columns)}
        for part in ("base", "tuned", "delta", "win_rate")
    }
    return Round(
        folder=folder,
        label=label_of(folder),
        base_evals=base_evals,
        stages=read_stages(folder / "stages.json"),
        counts=read_json(folder / "pair.json"),
        has_pairs=(folder / "pairs" / "dataset_info.json").exists(),
        draws=((scored_round(pairs, folder) or folder) / "prompts.jsonl").exists(),
        curve=read_metrics(folder / "checkpoints" / "metrics.jsonl"),
        prompts={row["id"]: row for row in rows("prompts.jsonl")},
        **found,
        rows={name: rows(f"{name}-rows.parquet") for name in means},
        answers={name: rows(f"{name}-answers.parquet") for name in means},
        written={
            what: found
            for what, place in WRITTEN.items()
            if (found := read_json(folder / f"{place}.llm" / "counts.json"))
        },
        missing=[f"{p} (agfsync {v})" for p, v in _parts(pairs) if not (folder / p).exists()],
    )


def _parts(pairs: str) -> list[tuple[str, str]]:
    """Parts that a round has, and their verbs; with a `config.pair.path` it begins with pairs."""
    others = {"prompts.jsonl", "candidates", "scores"} if pairs else set()
    if pairs and is_pairs(pairs):  # read where they lie
        others.add("pairs")
    return [(part, verb) for part, verb in PARTS.items() if part not in others]


def label_of(folder: Path) -> str:
    """ "round 0"."""
    return f"round {int(folder.name.removeprefix('round_'))}"
