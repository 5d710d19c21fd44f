"""Finished runs beside one another, as plain data: what they differ in, scores, learning curves."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agfsync_jax.data.columns import Column
from agfsync_jax.reports.rounds import Report, Round, read_report
from agfsync_jax.utils.configs import flatten
from agfsync_jax.utils.files import read_json
from agfsync_jax.utils.statistics import bootstrap

_ALIKE = 0.1  # of the spread of a base's scores: what other machines make of the same images
_SHOWN = 32  # letters of a value in a label
_SEED = "train.seed"

Intervals = dict[str, dict[str, float]]  # column -> {"mean", "low", "high"}


class Run(NamedTuple):
    """A finished workdir."""

    folder: Path
    report: Report
    settings: Mapping[str, Any]  # keys of config.json that decide what comes out
    differs: Mapping[str, Any] = {}  # of them those that are not alike in all runs
    label: str = ""  # the same as text; the folder's name where nothing differs
    against: Intervals = {}  # tuned less the tuned of the reference, image by image
    unpaired: str = ""  # why `against` lacks columns, or all of them

    @property
    def last(self) -> Round:
        """The last round, which is judged."""
        return self.report.last

    @property
    def curve(self) -> list[dict[str, float]]:
        """Training's metrics by step, those of later rounds after those of earlier ones."""
        rows, before = [], 0
        for each in self.report.rounds:
            rows += [row | {"step": row["step"] + before} for row in each.curve]
            before = rows[-1]["step"] if rows else 0
        return rows


class Group(NamedTuple):
    """Runs that differ in `train.seed` alone. Their intervals are of the runs' means: the mean of
    them, the lowest and the highest."""

    label: str
    runs: Sequence[Run]
    tuned: Intervals
    delta: Intervals


class Comparison(NamedTuple):
    """What `agfsync compare` shows."""

    runs: Sequence[Run]
    reference: Run
    columns: Mapping[str, Column]
    groups: Sequence[Group]


def read_comparison(
    folders: Sequence[Path],
    reference: int,
    *,
    columns_of: Callable[[Mapping[str, Any]], Mapping[str, Column]],
    is_run_time: Callable[[str], bool],
) -> Comparison:
    """Reads finished workdirs.

    Args:
        reference: the place of the run that the others are compared with.
        columns_of: a config.json -> what is known of the columns of its evaluation.
        is_run_time: whether a key of the config has no say in what comes out.

    Raises:
        FileNotFoundError, ValueError: what is no workdir, unfinished or damaged; says what to run.
    """
    runs = [_read_run(folder, columns_of, is_run_time) for folder in folders]
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    keys = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    runs = [run._replace(differs={key: run.settings.get(key) for key in keys}) for run in runs]
    labels = [_label(run.differs) or run.folder.name for run in runs]
    runs = [
        run._replace(label=label if labels.count(label) == 1 else f"{label} ({run.folder})")
        for run, label in zip(runs, labels, strict=True)
    ]
    first, columns = runs[reference], {}
    for run in (first, *runs):
        for name in run.last.delta:
            columns.setdefault(name, run.report.columns[name])
    runs = [run if run is first else _against(run, first, columns) for run in runs]
    return Comparison(runs, first, columns, _groups(runs, columns))


def _read_run(folder: Path, columns_of: Callable, is_run_time: Callable) -> Run:
    again = f"`agfsync run --config=... --workdir={folder}`"
    config = read_json(folder / "config.json")
    if not config:
        raise FileNotFoundError(f"{folder} is no workdir (no config.json): {again} makes one.")
    try:
        report = read_report(folder, columns_of(config), (), device="", versions={})
    except json.JSONDecodeError as error:  # a line of metrics
        raise ValueError(f"{folder} is damaged: checkpoints/metrics.jsonl: {error}") from error
    last, number = report.rounds[-1], config.get("rounds", 1) - 1
    if len(report.rounds) <= number or not (last.delta and all(last.rows.values())):
        raise ValueError(f"{folder} is unfinished: {again} goes on to the end of its evaluation.")
    settings = {key: value for key, value in flatten(config).items() if not is_run_time(key)}
    return Run(folder, report, settings)


def _label(differs: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        text = value if isinstance(value, str) else "–" if value is None else json.dumps(value)
        return text if len(text) <= _SHOWN else f"…{text[1 - _SHOWN :]}"

    return ", ".join(f"{key}={text(value)}" for key, value in differs.items())


def _against(run: Run, reference: Run, columns: Mapping[str, Column]) -> Run:
    """The run with its differences to the reference, of columns in which their bases agree."""
    texts = [
        {key: row["prompt"] for key, row in each.last.prompts.items()} for each in (reference, run)
    ]
    if texts[0] != texts[1]:
        return run._replace(unpaired="judged on other prompts")
    theirs, ours = reference.last.images(), run.last.images()
    if theirs.keys() != ours.keys():
        return run._replace(unpaired="judged on another number of images")
    prompts = np.array([prompt for prompt, _ in ours])
    found, unlike = {}, []
    for name in columns:
        if name not in reference.last.delta or name not in run.last.delta:
            unlike.append(name)
            continue
        # [their base, their tuned, our base, our tuned], an entry an image
        rows = zip(theirs.values(), ours.values(), strict=True)
        table = np.array([[row[name] for row in (*a, *b)] for a, b in rows], np.float64).T
        kept = np.isfinite(table).all(0)
        base, before, other, after = table[:, kept]
        if not kept.any() or np.abs(base - other).mean() > _ALIKE * base.std():
            unlike.append(name)
            continue
        found[name] = bootstrap(after - before, prompts[kept])
    why = f"other scores of the base: {', '.join(unlike)}" if unlike else ""
    return run._replace(against=found, unpaired=why)


def _groups(runs: Sequence[Run], columns: Mapping[str, Column]) -> list[Group]:
    """Those of two runs or more."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key != _SEED}
        alike.setdefault(repr(rest), []).append(run)

    def summary(found: Sequence[Run], part: str) -> Intervals:
        means = {
            name: [getattr(run.last, part)[name]["mean"] for run in found]
            for name in columns
            if all(name in run.last.delta for run in found)
        }
        return {
            name: {"mean": float(np.mean(each)), "low": min(each), "high": max(each)}
            for name, each in means.items()
        }

    groups = []
    for found in alike.values():
        if len(found) > 1:
            rest = {key: value for key, value in found[0].differs.items() if key != _SEED}
            label = f"{len(found)} seeds" + (f", {_label(rest)}" if rest else "")
            groups.append(Group(label, found, summary(found, "tuned"), summary(found, "delta")))
    return groups
