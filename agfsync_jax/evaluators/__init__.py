"""Judges that only look: a file here never has a say in pairs or training.

An evaluator is a class `Evaluator(**spec)` that is called like a scorer:

    evaluator(images [B,H,W,3] uint8, prompts [B], questions [B]) -> dict of columns, each [B]

A column "a/b" is a part of "a", such as one kind of check; NaN where it does not apply.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agfsync_jax import scorers
from agfsync_jax.utils import modules
from agfsync_jax.utils.statistics import bootstrap

KEYS = ("prompt_id", "candidate")


def load_evaluators(names: Sequence[str]) -> dict[str, Any]:
    """The judges that `config.evaluate.evaluators` names."""
    return {name: modules.load("evaluators", name).Evaluator() for name in names}


def judge(
    judges: Mapping[str, Any],
    images: np.ndarray,
    rows: Sequence[dict],
    prompts: Mapping[str, str],
    questions: Mapping[str, Sequence[Mapping]],
) -> None:
    """Adds the judges' columns to score rows, one row an image."""
    ids = [row["prompt_id"] for row in rows]
    texts, asked = [prompts[i] for i in ids], [questions.get(i, []) for i in ids]
    for evaluator in judges.values():
        for name, values in evaluator(images, texts, asked).items():
            for row, value in zip(rows, values, strict=True):
                row[name] = float(value)


def held_out(config: Any) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Prompt rows and question rows by prompt id; the same in every round."""
    spec = config.evaluate.to_dict()
    for key in ("num_seeds", "evaluators"):
        spec.pop(key)
    source = modules.load("prompt_sources", spec.pop("source"))
    rows = source.prompts(**spec, seed=config.seed, round_index=0)
    asked = []
    if scorers.asks_questions(config.scorers):
        spec = config.questions.to_dict()
        source = modules.load("prompt_sources", spec.pop("source"))
        asked = source.questions(rows, **spec, seed=config.seed)
        scorers.check_questions(rows, asked)
    return {row["id"]: row for row in rows}, scorers.by_prompt(asked)


def compare(base: list[dict], tuned: list[dict]) -> tuple[dict, dict]:
    """Means of both models, and their paired comparison, image by image.

    Args:
        base, tuned: rows with prompt_id, candidate and the same score columns, in any order.

    Returns:
        {"base": {metric: interval}, "tuned": ...} and {"delta": ..., "win_rate": ...}; intervals
        are {"mean", "low", "high"}. The win rate is the share of images with which the tuned model
        beats the base, a tie counting half.

    Raises:
        ValueError: rows of other images, or a score that is not finite.
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
    for metric in metrics(base[0]):
        before, after = (np.array([row[metric] for row in rows]) for rows in (base, tuned))
        for model, values in (("base", before), ("tuned", after)):
            if bad := int(np.count_nonzero(~np.isfinite(values))):
                raise ValueError(
                    f"{metric}: {bad} of {len(values)} scores of {model} are not finite"
                )
            means[model][metric] = bootstrap(values, prompts)
        wins = (after > before) + 0.5 * (after == before)
        comparison["delta"][metric] = bootstrap(after - before, prompts)
        comparison["win_rate"][metric] = bootstrap(wins, prompts)
    return means, comparison


def metrics(row: dict) -> list[str]:
    """The score columns of a row, without the parts ("a/b") of another column ("a")."""
    return [n for n in row if n not in KEYS and ("/" not in n or n.split("/")[0] not in row)]
