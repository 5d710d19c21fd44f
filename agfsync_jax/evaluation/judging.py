"""The images of an evaluation, through the scorers of the config and through its evaluators."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from agfsync_jax.data import records
from agfsync_jax.data.candidates import Shard
from agfsync_jax.data.images import decode_pngs
from agfsync_jax.data.scores import write_scores
from agfsync_jax.evaluators import Evaluator
from agfsync_jax.parallel.mesh import local_mesh
from agfsync_jax.scoring import engine
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage


def judged_path(images: Path) -> Path:
    """NAME.tfrecord -> NAME.parquet, beside it: scores, see data/scores.py."""
    return images.with_suffix(".parquet")


def judge_shards(
    config: Any,
    shards: Sequence[Shard],
    prompts: Mapping[str, str],
    questions: Mapping[str, Sequence[Mapping]],
    stage: Stage,
) -> None:
    """Writes scores and answers beside each shard of images.

    Args:
        prompts: prompt id -> text.
        questions: prompt id -> its question rows.

    Raises:
        RecordError: a damaged shard.
    """
    names = config.evaluate.evaluators
    evaluators = [modules.load("evaluators", name).Evaluator() for name in names]
    mesh = local_mesh(config.score.mesh)
    size = engine.batch_size(config, mesh, max(len(shard.rows) for shard in shards))
    scorers = engine.load_scorers(mesh, config.scorers.to_dict(), batch_size=size)
    drawn, counts = stage.items, {shard.path: len(shard.rows) for shard in shards}
    with stage.progress(sum(len(shard.rows) for shard in shards), "scores") as progress:
        for path, rows, answers, _ in engine.score_shards(
            scorers,
            [shard.path for shard in shards],
            prompts,
            questions,
            batch_size=size,
            expected=counts.__getitem__,
            scored=progress.update,
        ):
            fields = records.read_shard(
                path, records.CANDIDATE_FEATURES, ["image"], num_rows=counts[path]
            )
            images = decode_pngs([row["image"] for row in fields])
            judge(evaluators, images, rows, prompts, questions)
            write_scores(judged_path(path), rows, answers)
    stage.items = drawn  # an image counts once


def judge(
    evaluators: Sequence[Evaluator],
    images: UInt8[np.ndarray, "b h w 3"],
    rows: Sequence[dict],
    prompts: Mapping[str, str],
    questions: Mapping[str, Sequence[Mapping]],
) -> None:
    """Adds the evaluators' columns to score rows, one row an image."""
    ids = [row["prompt_id"] for row in rows]
    texts, asked = [prompts[i] for i in ids], [questions.get(i, []) for i in ids]
    for evaluator in evaluators:
        for name, values in evaluator(images, texts, asked).items():
            for row, value in zip(rows, values, strict=True):
                row[name] = float(value)
