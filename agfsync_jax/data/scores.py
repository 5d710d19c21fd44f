"""The tables of scored shards: where they lie, written, mended, and read.

NAME.parquet has a row an image, answers-NAME.parquet a row a question and image, and
problems-NAME.jsonl says what was left out; the last two are there if there is something in them.
They are read column by column, as a round has millions of answers.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS
from agfsync_jax.data.preferences import Scored
from agfsync_jax.utils.statistics import tifa


def scores_path(candidates: Path) -> Path:
    """candidates/NAME.tfrecord -> scores/NAME.parquet."""
    return candidates.parents[1] / "scores" / f"{candidates.stem}.parquet"


def answers_path(scores: Path) -> Path:
    """scores/NAME.parquet -> scores/answers-NAME.parquet."""
    return scores.with_name(f"answers-{scores.name}")


def problems_path(scores: Path) -> Path:
    """scores/NAME.parquet -> scores/problems-NAME.jsonl."""
    return scores.with_name(f"problems-{scores.stem}.jsonl")


def write_scores(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    problems: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes the tables of a shard; the scores come last, as they say that the shard is done."""
    problems_path(path).unlink(missing_ok=True)
    if problems:
        records.write_jsonl(problems_path(path), problems)
    if answers:
        records.write_parquet(answers_path(path), answers)
    records.write_parquet(path, rows)


def repair_scores(images: Path, scores: Path) -> bool:
    """Drops what is damaged of a shard of images and its tables.

    Scores go too where their answers are damaged, or where something was left out, which may have
    been mended; and images of which some could not be decoded.

    Returns:
        whether the images were dropped, and must be drawn anew.
    """
    answers, problems = answers_path(scores), problems_path(scores)
    dropped = images.exists() and records.repair_shard(images)
    if problems.exists() and not records.repair_shard(problems):
        scores.unlink(missing_ok=True)
        if any(row["kind"] == "undecodable" for row in records.read_jsonl(problems)):
            images.unlink(missing_ok=True)
            dropped = True
        problems.unlink()
    if answers.exists() and records.repair_shard(answers):
        scores.unlink(missing_ok=True)
    if scores.exists():
        records.repair_shard(scores)
    return dropped


def read_scores(path: Path, scorers: Collection[str]) -> Scored:
    """The scores of a shard, and what is known of the questions that were asked.

    Args:
        path: scores/NAME.parquet; its answers are read where they are there.
        scorers: names of those whose questions must all have an answer, for a candidate to count.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file.
        ValueError: a column that it lacks.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = records.read_table(path)
    columns = {}
    for field in table.schema:
        kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        if field.name not in KEYS and any(kind(field.type) for kind in kinds):
            columns[field.name] = table[field.name].cast(pa.float64()).to_numpy()  # null is NaN
    scores = Scored(*(table[name].to_pylist() for name in KEYS), columns)
    answers = answers_path(path)
    if not answers.exists():
        return scores
    table = records.read_table(answers, [*KEYS, "scorer", "index", "answer"])
    of_scorers = pc.is_in(table["scorer"], pa.array(scorers, pa.string()))
    without = table.filter(pc.and_(pc.is_null(table["answer"]), of_scorers))
    asked = table.group_by("prompt_id").aggregate([("index", "count_distinct")])
    names = asked["prompt_id"].to_pylist(), asked["index_count_distinct"].to_pylist()
    return scores._replace(
        unanswered=frozenset(zip(*(without[name].to_pylist() for name in KEYS), strict=True)),
        num_questions=dict(zip(*names, strict=True)),
    )


def answered(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """A scorer's answers as TIFA sums them up; see `utils.statistics.tifa`. An image is a caption.

    Args:
        paths: scores/NAME.parquet each; those without answers are left out.
    """
    found: dict[str, list] = {}
    for path in map(answers_path, paths):
        if not path.exists():
            continue
        table = records.read_table(path, [*KEYS, "scorer", "element_type", "answer", "correct"])
        columns = {name: np.asarray(table[name].to_pylist()) for name in ("scorer", "correct")}
        types = np.asarray(table["element_type"].to_pylist())
        images = np.char.add(
            np.char.add(np.asarray(table["prompt_id"].to_pylist(), str), " "),
            table["candidate"].to_numpy().astype(str),
        )
        given = ~np.asarray(table["answer"].is_null())
        for scorer in np.unique(columns["scorer"]):
            rows = given & (columns["scorer"] == scorer)
            part = images[rows], types[rows], columns["correct"][rows]
            found.setdefault(str(scorer), []).append(part)
    return {
        scorer: tifa(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        for scorer, parts in found.items()
    }
