"""Base against tuned, image by image, with 95% bootstrap intervals over prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.candidates import Shard
from agfsync_jax.data.columns import KEYS, without_parts
from agfsync_jax.data.scores import answers_path
from agfsync_jax.evaluation.judging import judged_path
from agfsync_jax.utils.statistics import bootstrap


def conclude(shards: Mapping[str, Sequence[Shard]], evals: Path) -> dict[str, int]:
    """Gathers the shards' tables and writes means, differences and win rates.

    Args:
        shards: all of "base" and of "tuned", judged.
        evals: the folder that gets MODEL-rows.parquet, MODEL-answers.parquet, base.json, tuned.json
            and comparison.json.

    Returns:
        metric -> how many images are left out of it, of those with any.
    """
    tables = {}
    for model, found in shards.items():
        paths = [judged_path(shard.path) for shard in found]
        tables[model] = [row for path in paths for row in records.read_parquet(path)]
        records.write_parquet(evals / f"{model}-rows.parquet", tables[model])
        answered = [path for path in map(answers_path, paths) if path.exists()]
        if answers := [row for path in answered for row in records.read_parquet(path)]:
            records.write_parquet(evals / f"{model}-answers.parquet", answers)
    means, comparison = compare(tables["base"], tables["tuned"])
    for name, result in (means | {"comparison": comparison}).items():
        records.write_file(evals / f"{name}.json", [json.dumps(result, indent=2).encode(), b"\n"])
    return comparison.get("left_out", {})


def compare(base: list[dict], tuned: list[dict]) -> tuple[dict, dict]:
    """Means of both models, and their paired comparison, image by image.

    Args:
        base, tuned: rows with prompt_id, candidate and the same score columns, in any order.

    Returns:
        {"base": {metric: interval}, "tuned": ...} and {"delta": ..., "win_rate": ...}; intervals
        are {"mean", "low", "high"}. The win rate is the share of images with which the tuned model
        beats the base, a tie counting half. An image without a finite score of either model is
        left out of that metric, and counted in comparison["left_out"].

    Raises:
        ValueError: rows of other images, or no image with finite scores.
    """

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in KEYS)

    base, tuned = sorted(base, key=key), sorted(tuned, key=key)
    if [key(row) for row in base] != [key(row) for row in tuned]:
        raise ValueError(
            f"base and tuned must be scores of the same images, got {len(base)} and {len(tuned)}"
            " rows that do not match; remove evals/ and evaluate again"
        )
    prompts = np.array([row["prompt_id"] for row in base])
    means: dict[str, dict] = {"base": {}, "tuned": {}}
    comparison: dict[str, dict] = {"delta": {}, "win_rate": {}}
    for metric in without_parts(name for name in base[0] if name not in KEYS):
        before, after = (np.array([row[metric] for row in rows]) for rows in (base, tuned))
        kept = np.isfinite(before) & np.isfinite(after)
        if not kept.any():
            raise ValueError(f"{metric}: no image has a finite score of both models")
        if not kept.all():
            comparison.setdefault("left_out", {})[metric] = int(np.count_nonzero(~kept))
        of, before, after = prompts[kept], before[kept], after[kept]
        means["base"][metric], means["tuned"][metric] = bootstrap(before, of), bootstrap(after, of)
        wins = (after > before) + 0.5 * (after == before)
        comparison["delta"][metric] = bootstrap(after - before, of)
        comparison["win_rate"][metric] = bootstrap(wins, of)
    return means, comparison
