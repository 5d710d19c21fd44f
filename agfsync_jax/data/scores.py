"""What `agfsync score` has left, read column by column: a round has millions of answers."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.data.preferences import Scored
from agfsync_jax.data.records import read_table
from agfsync_jax.utils.statistics import tifa

_KEYS = ["prompt_id", "candidate"]


def read_scores(path: Path, scorers: Collection[str]) -> Scored:
    """The scores of a shard, and what is known of the questions that were asked.

    Args:
        path: scores/<shard>.parquet; scores/answers-<shard>.parquet is read where it is there.
        scorers: names of those whose questions must all have an answer, for a candidate to count.

    Raises:
        FileNotFoundError: no such file.
        RecordError: a damaged file.
        ValueError: a column that it lacks.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = read_table(path)
    columns = {}
    for field in table.schema:
        kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        if field.name not in _KEYS and any(kind(field.type) for kind in kinds):
            columns[field.name] = table[field.name].cast(pa.float64()).to_numpy()  # null is NaN
    scores = Scored(*(table[name].to_pylist() for name in _KEYS), columns)
    answers = path.with_name(f"answers-{path.name}")
    if not answers.exists():
        return scores
    table = read_table(answers, [*_KEYS, "scorer", "index", "answer"])
    of_scorers = pc.is_in(table["scorer"], pa.array(scorers, pa.string()))
    without = table.filter(pc.and_(pc.is_null(table["answer"]), of_scorers))
    asked = table.group_by("prompt_id").aggregate([("index", "count_distinct")])
    names = asked["prompt_id"].to_pylist(), asked["index_count_distinct"].to_pylist()
    return scores._replace(
        unanswered=frozenset(zip(*(without[name].to_pylist() for name in _KEYS), strict=True)),
        num_questions=dict(zip(*names, strict=True)),
    )


def answered(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """A scorer's answers as TIFA sums them up; see `utils.statistics.tifa`. An image is a caption.

    Args:
        paths: scores/answers-<shard>.parquet; those that are not there are left out.
    """
    found: dict[str, list] = {}
    for path in paths:
        if not path.exists():
            continue
        table = read_table(path, [*_KEYS, "scorer", "element_type", "answer", "correct"])
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
