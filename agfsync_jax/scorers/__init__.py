"""Images in, numbers out: a scorer a file, and here how shards of candidates go through them.

A scorer is a class `Scorer(mesh, **spec)`, called as `scorer(images uint8 [b, h, w, 3], prompts,
questions)` with b texts and b lists of question rows. It returns a dict of columns, each [b]; a
column "answers" holds for each image a list of dicts, one a question. A scorer that does not read
the questions says so with `asks_questions = False`.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax.data import images as png
from agfsync_jax.data import records
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import modules

_KEYS = ("prompt_id", "candidate")
_FIELDS = (*_KEYS, "image")
_BATCHES_AHEAD = 2  # decoded while the device is busy


def scorer_class(column: str, spec: Mapping[str, Any]) -> type:
    """The class that the block `config.scorers.<column>` names."""
    if "name" not in spec:
        raise ValueError(f"config.scorers.{column} has no name: which file of scorers is it?")
    return modules.load("scorers", spec["name"]).Scorer


def asks_questions(specs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any scorer of `config.scorers` reads the questions."""
    return any(
        getattr(scorer_class(column, spec), "asks_questions", True)
        for column, spec in specs.items()
    )


def check_questions(prompt_rows: Sequence[Mapping], question_rows: Iterable[Mapping]) -> None:
    """Raises ValueError unless every prompt has at least one question."""
    asked = {row["id"] for row in question_rows}
    without = [row for row in prompt_rows if row["id"] not in asked]
    if without:
        raise ValueError(
            f"{len(without)} of {len(prompt_rows)} prompts have no question, the first is"
            f" {without[0]['id']} ({without[0]['prompt']!r}): a scorer asks them, so give each"
            " prompt one, or take that scorer out of config.scorers."
        )


def check_weights(weights: Mapping[str, float], specs: Mapping[str, Any]) -> None:
    """Raises ValueError unless each weight names a column that the scorers will make."""
    unknown = [name for name in weights if name.split("/")[0] not in specs]
    if unknown:
        raise ValueError(
            f"config.pair.weights names {', '.join(map(repr, unknown))}, which no scorer makes:"
            f" config.scorers has {', '.join(map(repr, specs)) or 'none'}."
        )


def local_mesh(spec: Mapping[str, int]) -> Mesh:
    """The mesh that scores: each process scores shards of its own, on its own devices."""
    alone = jax.process_count() == 1
    return create_mesh(spec if alone else {"data": -1}, devices=jax.local_devices())


def load_scorers(
    mesh: Mesh, specs: Mapping[str, Mapping[str, Any]], *, batch_size: int
) -> dict[str, Any]:
    """The scorers of `config.scorers`, column -> scorer, with their weights on the device.

    `batch_size` is for those whose block names none.
    """
    classes = {column: scorer_class(column, spec) for column, spec in specs.items()}
    arguments = {
        column: {"batch_size": batch_size} | {k: v for k, v in spec.items() if k != "name"}
        for column, spec in specs.items()
    }
    return {column: classes[column](mesh, **arguments[column]) for column in specs}


def score_images(
    scorers: Mapping[str, Any],
    images: np.ndarray,
    prompts: Sequence[str],
    questions: Sequence[Sequence[Mapping]],
) -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """Runs every scorer over a batch.

    Returns:
        columns [b], named after the config's block (block/column where a scorer makes several),
        and block -> the answers that it gave, a list for each image.
    """
    columns, answers = {}, {}
    for block, scorer in scorers.items():
        made = dict(scorer(images, prompts, questions))
        if "answers" in made:
            answers[block] = made.pop("answers")
        for name, values in made.items():
            column = block if len(made) == 1 else f"{block}/{name}"
            columns[column] = np.asarray(values, np.float32)
            if columns[column].shape != (len(images),):
                raise ValueError(
                    f"scorer {block!r} made {name} of shape {columns[column].shape}:"
                    f" expected ({len(images)},), one number an image."
                )
    return columns, answers


def score_shards(
    scorers: Mapping[str, Any],
    paths: Sequence[Path],
    prompts: Mapping[str, str],
    questions: Mapping[str, Sequence[Mapping]],
    *,
    batch_size: int,
    scored: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[Path, list[dict], list[dict]]]:
    """Scores shards of candidates batch by batch, decoding the next ones meanwhile.

    Args:
        scorers: from `load_scorers`.
        paths: TFRecord files of candidates.
        prompts: prompt id -> text.
        questions: prompt id -> its question rows; others count as having none.
        batch_size: images at a time; a batch lies in one shard.
        scored: called with the number of images after each batch.

    Yields:
        (path, rows of scores, rows of answers) of each shard, as soon as its last image is scored.

    Raises:
        RecordError: a damaged shard.
        ValueError: a candidate of a prompt that is not in `prompts`.
    """
    scores, answers = [], []
    for path, rows, images, is_last in _ahead(_decoded(paths, batch_size)):
        for row in rows:
            if row["prompt_id"] not in prompts:
                raise ValueError(f"{path} draws prompt {row['prompt_id']!r}, which is not listed.")
        ids = [row["prompt_id"] for row in rows]
        asked = [questions.get(prompt, []) for prompt in ids]
        columns, replies = score_images(scorers, images, [prompts[i] for i in ids], asked)
        scores += [
            {key: row[key] for key in _KEYS} | {name: float(v[i]) for name, v in columns.items()}
            for i, row in enumerate(rows)
        ]
        answers += _answer_rows(rows, asked, replies)
        scored(len(rows))
        if is_last:
            yield path, scores, answers
            scores, answers = [], []


def by_prompt(question_rows: Iterable[Mapping]) -> dict[str, list[Mapping]]:
    """Question rows under the id of their prompt."""
    grouped = defaultdict(list)
    for row in question_rows:
        grouped[row["id"]].append(row)
    return dict(grouped)


def _answer_rows(rows: list[dict], asked: list, answers: dict[str, list]) -> Iterator[dict]:
    for block, given in answers.items():
        for row, questions, replies in zip(rows, asked, given, strict=True):
            for index, (question, reply) in enumerate(zip(questions, replies, strict=True)):
                yield {key: row[key] for key in _KEYS} | {
                    "scorer": block,
                    "index": index,
                    "question": question["question"],
                    "element_type": question["element_type"],
                    "expected": question["answer"],
                    "answer": str(reply["answer"]),
                    "p_yes": float(reply["p_yes"]),
                    "correct": bool(reply["correct"]),
                }


def _decoded(
    paths: Sequence[Path], batch_size: int
) -> Iterator[tuple[Path, list[dict], np.ndarray, bool]]:
    """(path, rows, images, whether the shard ends here) of each batch."""
    for path in paths:
        rows = records.read_shard(path, records.CANDIDATE_FEATURES, _FIELDS)
        batch = list(itertools.islice(rows, batch_size))
        while batch:
            following = list(itertools.islice(rows, batch_size))
            images = png.decode_pngs([row.pop("image") for row in batch])
            yield path, batch, images, not following
            batch = following


def _ahead(work: Iterator) -> Iterator:
    """The same items, made in a thread that runs ahead of whoever asks for them."""
    done = object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, work, done) for _ in range(_BATCHES_AHEAD))
        while (item := pending.popleft().result()) is not done:
            pending.append(pool.submit(next, work, done))
            yield item
