"""The tables of scored shards: where they lie, written, mended, and read.

NAME.parquet has a row an image, answers-NAME.parquet a row a question and image, and
problems-NAME.jsonl says what was left out; the last two are there if there is something in them.
They are read column by column, as a round has millions of answers.
"""

import contextlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS
from agfsync_jax.data.preferences import Scored
from agfsync_jax.data.problems import OF_IMAGES
from agfsync_jax.data.shards import shard_paths
from agfsync_jax.utils.files import to_path
from agfsync_jax.utils.statistics import tifa


def scored_round(path: str | os.PathLike, own: Path) -> Path | None:
    """The round folder whose candidates and scores become a round's pairs.

    Args:
        path: `config.pair.path`.
        own: the round's own folder, which it is where `path` is empty.

    Returns:
        the folder; None where `path` names something else: pairs, or what people preferred.
    """
    if not path:
        return own
    folder = to_path(path).expanduser()
    is_round = (folder / "prompts.jsonl").is_file() and (folder / "candidates").is_dir()
    return folder if is_round else None


def check_scored(folder: Path, weights: Mapping[str, float]) -> None:
    """Looks whether pairs can be made of a round folder, before any are.

    Raises:
        FileNotFoundError: shards of candidates or scores are missing; names the verb.
        ValueError: no score has a column that is among the `weights`.
    """
    shard_paths(folder / "candidates", ".tfrecord", "sample")
    first, *_ = shard_paths(folder / "scores", ".parquet", "score")
    columns = [name for name in records.read_table(first).column_names if name not in KEYS]
    if missing := [name for name, weight in weights.items() if weight and name not in columns]:
        raise ValueError(
            f"config.pair.weights names {', '.join(missing)}, and the scores of"
            f" config.pair.path={folder} are {', '.join(columns)}."
        )


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


def repair_images(images: Path, scores: Path, num_images: int) -> bool:
    """Drops a shard of images that is damaged, or has some that could not be decoded when it was
    scored; whether it was dropped."""
    dropped = images.exists() and records.repair_shard(images, num_images)
    with contextlib.suppress(FileNotFoundError, records.RecordError):
        if any(row["kind"] == "undecodable" for row in records.read_jsonl(problems_path(scores))):
            images.unlink(missing_ok=True)
            return True
    return dropped


def repair_scores(images: Path, scores: Path, num_images: int) -> bool:
    """Drops what is damaged of a shard of images and its tables; whether the images were.

    Scores go too where their answers are damaged, or where something was left out, which may have
    been mended.
    """
    dropped, answers = repair_images(images, scores, num_images), answers_path(scores)
    drop_incomplete(scores)
    if answers.exists() and records.repair_shard(answers):
        scores.unlink(missing_ok=True)
    if scores.exists():
        records.repair_shard(scores)
    return dropped


def drop_incomplete(scores: Path) -> None:
    """Removes the scores of a shard of which something was left out, so that they are made anew."""
    if problems_path(scores).exists():
        scores.unlink(missing_ok=True)
        problems_path(scores).unlink(missing_ok=True)


def num_images(scores: Path) -> int:
    """How many images a scored shard must have: those in the table, and those left out of it."""
    count = records.read_table(scores, KEYS).num_rows
    if problems_path(scores).exists():
        for row in records.read_jsonl(problems_path(scores)):
            count += row["count"] * (row["kind"] in OF_IMAGES)
    return count


def read_scores(folder: Path, settings) -> dict[str, Scored]:
    """Shard of scores/ -> its scores, and what is known of the questions that were asked.

    A candidate counts if all questions of the scorers that have a weight in `settings`, which is
    `config.pair`, have an answer.

    Raises:
        FileNotFoundError: a shard is missing.
        RecordError: a damaged file.
        ValueError: answers that are not there, or shards of different columns.
    """
    asking = {name.split("/")[0] for name, weight in settings.weights.items() if weight}
    paths = shard_paths(folder, ".parquet", "score")
    if settings.min_questions and not any(folder.glob("answers-*.parquet")):
        raise ValueError(
            f"config.pair.min_questions={settings.min_questions}: {folder} has no answers, as no"
            " scorer asked questions. Set it to 0, or score again with one that asks."
        )
    scores = {path.stem: _read_shard(path, asking) for path in paths}
    columns = {shard: scored.columns.keys() for shard, scored in scores.items()}
    first, *others = scores
    for shard in others:
        if columns[shard] != columns[first]:
            raise ValueError(
                f"{folder}: {first} has the columns {', '.join(columns[first])}, {shard} has"
                f" {', '.join(columns[shard])}. Remove the stale ones and run `agfsync score`."
            )
    return scores


def _read_shard(path: Path, asking: Collection[str]) -> Scored:
    import pyarrow as pa
    import pyarrow.compute as pc

    table = records.read_table(path)
    columns = {}
    for field in table.schema:
        kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_null)
        if field.name not in KEYS and any(kind(field.type) for kind in kinds):
            columns[field.name] = table[field.name].cast(pa.float64()).to_numpy()  # null is NaN
    keys = (table[name].to_pylist() for name in KEYS)
    scores = Scored(*keys, columns, num_images=num_images(path))
    answers = answers_path(path)
    if not answers.exists():
        return scores
    table = records.read_table(answers, [*KEYS, "scorer", "index", "answer"])
    of_scorers = pc.is_in(table["scorer"], pa.array(asking, pa.string()))
    without = table.filter(pc.and_(pc.is_null(table["answer"]), of_scorers))
    asked = table.group_by("prompt_id").aggregate([("index", "count_distinct")])
    names = asked["prompt_id"].to_pylist(), asked["index_count_distinct"].to_pylist()
    return scores._replace(
        unanswered=frozenset(zip(*(without[name].to_pylist() for name in KEYS), strict=True)),
        num_questions=dict(zip(*names, strict=True)),
    )


def answered(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Scorer -> its answers as TIFA sums them up (`utils.statistics.tifa`); an image is a caption.

    Of scores/NAME.parquet those without answers are left out.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    fields = [*KEYS, "scorer", "element_type", "answer", "correct"]
    there = [path for path in map(answers_path, paths) if path.exists()]
    if not there:
        return {}
    tables = [records.read_table(path, fields) for path in there]
    table = pa.concat_tables(tables, promote_options="default")
    numbers = table["candidate"].cast(pa.string())
    images = pc.binary_join_element_wise(table["prompt_id"], numbers, " ")
    given = table.append_column("image", images).filter(pc.is_valid(table["answer"]))
    found = {}
    for scorer in sorted(pc.unique(table["scorer"]).to_pylist()):
        part = given.filter(pc.equal(given["scorer"], scorer))
        columns = [part[name].to_pylist() for name in ("image", "element_type", "correct")]
        found[scorer] = tifa(*columns)
    return found
