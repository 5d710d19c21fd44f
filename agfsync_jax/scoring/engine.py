"""Shards of candidates through the scorers, batch by batch."""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from agfsync_jax.data import images as png
from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS
from agfsync_jax.data.problems import problem
from agfsync_jax.parallel.sharding import batch_shards
from agfsync_jax.scorers import Scorer
from agfsync_jax.scoring.columns import named, scorer_class

_FIELDS = (*KEYS, "image")
_BATCHES_AHEAD = 2  # decoded while the device is busy


def load_scorers(
    mesh: Mesh, specs: Mapping[str, Mapping[str, Any]], *, batch_size: int
) -> dict[str, Scorer]:
    """The scorers of `config.scorers`, block -> scorer, with their weights on the device.

    `batch_size` is for those whose block names none.
    """
    classes = {block: scorer_class(block, spec) for block, spec in specs.items()}
    settings = {"batch_size": batch_size}
    return {
        block: classes[block](mesh, **settings | {k: v for k, v in spec.items() if k != "name"})
        for block, spec in specs.items()
    }


def batch_size(config: Any, mesh: Mesh, num_images: int) -> int:
    """Images at a time on a process's devices; more than there are would be padding."""
    return min(config.score.device_batch_size * batch_shards(mesh), num_images)


def score_images(
    scorers: Mapping[str, Scorer],
    images: UInt8[np.ndarray, "b h w 3"],
    prompts: Sequence[str],
    questions: Sequence[Sequence[Mapping]],
) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Runs every scorer over a batch.

    Returns:
        columns [b], named after the config's block (block/column where a scorer makes several),
        and block -> the answers that it gave, a list for each image.

    Raises:
        ValueError: a scorer made other columns than it says, or of another shape.
    """
    columns, answers = {}, {}
    for block, scorer in scorers.items():
        made = dict(scorer(images, prompts, questions))
        if "answers" in made:
            answers[block] = made.pop("answers")
        if made.keys() != scorer.columns.keys():
            raise ValueError(
                f"scorer {block!r} made {', '.join(made) or 'nothing'}: its class says that its"
                f" columns are {', '.join(scorer.columns)}."
            )
        for column, values in named(block, made).items():
            columns[column] = np.asarray(values, np.float32)
            if columns[column].shape != (len(images),):
                raise ValueError(
                    f"scorer {block!r} made {column} of shape {columns[column].shape}:"
                    f" expected ({len(images)},), one number an image."
                )
    return columns, answers


class ScoredShard(NamedTuple):
    """A shard of candidates that has been through all scorers."""

    path: Path  # of the candidates
    scores: list[dict]  # a row an image: prompt_id, candidate, a number a column
    answers: list[dict]  # a row a question and image
    problems: list[dict]  # what was left out; see data/problems.py


def score_shards(
    scorers: Mapping[str, Scorer],
    paths: Sequence[Path],
    prompts: Mapping[str, str],
    questions: Mapping[str, Sequence[Mapping]],
    *,
    batch_size: int,
    expected: Callable[[Path], int],
    leave_out: bool = False,
    scored: Callable[[int], None] = lambda count: None,
) -> Iterator[ScoredShard]:
    """Scores shards of candidates batch by batch, decoding the next ones meanwhile.

    Args:
        paths: TFRecord files of candidates.
        prompts, questions: of each prompt id; who is not in `questions` counts as having none.
        batch_size: images at a time; a batch lies in one shard.
        expected: the number of images that a shard must have.
        leave_out: what is damaged is left out and counted; else it raises.
        scored: called with the number of images after each batch.

    Yields:
        each shard, as soon as its last image is scored.

    Raises:
        RecordError: a damaged shard, or an image that cannot be decoded.
        ValueError: a candidate of a prompt that is not in `prompts`.
    """
    records.example_class()
    scores, answers, problems = [], [], []
    for path, rows, images, lost, is_last in _ahead(
        _decoded(paths, batch_size, expected, leave_out)
    ):
        for row in rows:
            if row["prompt_id"] not in prompts:
                raise ValueError(f"{path} draws prompt {row['prompt_id']!r}, which is not listed.")
        asked = [questions.get(row["prompt_id"], []) for row in rows]
        problems += lost
        if rows:
            texts = [prompts[row["prompt_id"]] for row in rows]
            columns, replies = score_images(scorers, images, texts, asked)
            scores += [
                {key: row[key] for key in KEYS} | {name: float(v[i]) for name, v in columns.items()}
                for i, row in enumerate(rows)
            ]
            answers += _answer_rows(rows, asked, replies)
            problems += _problems(scorers, rows, asked, columns, replies)
            scored(len(rows))
        if is_last:
            yield ScoredShard(path, scores, answers, problems)
            scores, answers, problems = [], [], []


def _answer_rows(rows: list[dict], asked: list, answers: dict[str, list]) -> Iterator[dict]:
    for block, given in answers.items():
        for row, questions, replies in zip(rows, asked, given, strict=True):
            for index, (question, reply) in enumerate(zip(questions, replies, strict=True)):
                yield {
                    **{key: row[key] for key in KEYS},
                    "scorer": block,
                    "index": index,
                    "question": question["question"],
                    "element_type": question["element_type"],
                    "expected": question["answer"],
                    "answer": reply["answer"],
                    "p_yes": float(reply["p_yes"]),
                    "p_expected": float(reply["p_expected"]),
                    "correct": bool(reply["correct"]),
                    **{key: reply[key] for key in ("written",) if key in reply},
                }


def _problems(
    scorers: Mapping[str, Scorer],
    rows: Sequence[dict],
    asked: Sequence[Sequence],
    columns: Mapping[str, np.ndarray],
    answers: Mapping[str, list],
) -> Iterator[dict]:
    """Answers and scores that are not there; a mean over no answers is not counted once more."""
    silent = defaultdict(set)  # block -> the images that it has no answer about
    for block, given in answers.items():
        for image, replies in enumerate(given):
            lacking = [reply["question"] for reply in replies if reply["answer"] is None]
            if len(lacking) == len(replies):
                silent[block].add(image)
            for question in lacking:
                yield problem("unanswered", _where(rows[image]), f"{block} on {question!r}")
    for block, scorer in scorers.items():
        if scorer.asks_questions:
            silent[block].update(image for image, each in enumerate(asked) if not each)
    for name, values in columns.items():
        for image in np.flatnonzero(~np.isfinite(values)):
            if image not in silent[name.split("/")[0]]:
                yield problem("nonfinite", _where(rows[image]), f"{name} is {values[image]}")


def _where(row: Mapping[str, Any]) -> str:
    return f"prompt {row['prompt_id']}, candidate {row['candidate']}"


Batch = tuple[Path, list[dict], np.ndarray, list[dict], bool]


def _decoded(
    paths: Sequence[Path], batch_size: int, expected: Callable[[Path], int], leave_out: bool
) -> Iterator[Batch]:
    """(path, rows, images, what was left out, whether the shard ends here) of each batch."""
    for path in paths:
        size = expected(path)
        rows = records.read_shard(path, records.CANDIDATE_FEATURES, _FIELDS, num_rows=size)
        count, more = 0, True
        while more:
            batch, lost = [], []
            try:
                for row in itertools.islice(rows, batch_size):
                    batch.append(row)
                more = len(batch) == batch_size
            except records.RecordError as error:
                if not leave_out:
                    raise
                lacking = max(size - count - len(batch), 1)
                lost.append(problem("damaged", f"shard {path.stem}", str(error), lacking))
                more = False
            count += len(batch)
            images = png.decode_each([row.pop("image") for row in batch])
            kept = []
            for row, image in zip(batch, images, strict=True):
                if not isinstance(image, ValueError):
                    kept.append((row, image))
                elif not leave_out:
                    raise records.RecordError(path, None, f"{_where(row)}: {image}")
                else:
                    where = f"shard {path.stem}, {_where(row)}"
                    lost.append(problem("undecodable", where, str(image)))
            pixels = png.stack_images([image for _, image in kept])
            yield path, [row for row, _ in kept], pixels, lost, not more


def _ahead(work: Iterator) -> Iterator:
    """The same items, made in a thread that runs ahead of whoever asks for them."""
    done = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, work, done) for _ in range(_BATCHES_AHEAD))
        while (item := pending.popleft().result()) is not done:
            pending.append(pool.submit(next, work, done))
            yield item
