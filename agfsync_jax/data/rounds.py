"""What rounds have left in a workdir, read back for a person to look at."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.utils import panels
from agfsync_jax.utils.clock import read_stages
from agfsync_jax.utils.metrics import read_metrics

PAIRS_SHOWN = 4  # with the largest margin, and as many with the smallest
# What a round leaves, and the verb that makes it.
PARTS = {
    "prompts.jsonl": "prompts",
    "candidates": "sample",
    "scores": "score",
    "pairs": "pair",
    "checkpoints": "train",
    "evals/comparison.json": "evaluate",
}


def read_round(folder: Path, base_evals: Path) -> SimpleNamespace:
    """All that a report needs of a round but images; parts that are not there yet are empty."""

    def parquet(path: Path) -> list[dict]:
        return records.read_parquet(path) if path.exists() else []

    def parsed(path: Path) -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    def jsonl(path: Path) -> list[dict]:
        return records.read_jsonl(path) if path.exists() else []

    def ordered(values: dict) -> dict:
        return {metric: values[metric] for metric in panels.in_order(values)}

    evals = folder / "evals"
    comparison = parsed(evals / "comparison.json")
    return SimpleNamespace(
        folder=folder,
        base_evals=base_evals,
        label=f"round {int(folder.name.removeprefix('round_'))}",
        stages=read_stages(folder / "stages.json"),
        counts=parsed(folder / "pair.json"),
        pair_rows=_read_pairs(folder),
        curve=read_metrics(folder / "checkpoints" / "metrics.jsonl"),
        prompts={row["id"]: row["prompt"] for row in jsonl(evals / "prompts.jsonl")},
        base=ordered(parsed(evals / "base.json")),
        tuned=ordered(parsed(evals / "tuned.json")),
        delta=ordered(comparison.get("delta", {})),
        win_rate=ordered(comparison.get("win_rate", {})),
        rows={name: parquet(evals / f"{name}-rows.parquet") for name in ("base", "tuned")},
        answers={name: parquet(evals / f"{name}-answers.parquet") for name in ("base", "tuned")},
        missing=[f"{p} (agfsync {v})" for p, v in PARTS.items() if not (folder / p).exists()],
    )


def _read_pairs(folder: Path) -> list[dict]:
    """Pairs without arrays and images, the largest margin first."""
    if not (folder / "pairs").is_dir():
        return []
    fields = ("prompt_id", "prompt", "chosen_candidate", "rejected_candidate")
    fields += ("chosen_score", "rejected_score", "margin")
    columns = records.read_pairs(folder / "pairs", fields)
    pairs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return sorted(pairs, key=lambda pair: -pair["margin"])


def pick_examples(last: SimpleNamespace, count: int, seed: int) -> dict[str, list[dict]]:
    """{heading: examples}: a fixed random sample, the most improved and the most worsened.

    An example is what `panels.picture_cards` takes; the judge is the referee, else the VQA score.
    """
    rows = {
        name: {(r["prompt_id"], r["candidate"]): r for r in last.rows[name]} for name in last.rows
    }
    keys = sorted(rows["base"].keys() & rows["tuned"].keys())
    judges = [m for m in ("referee", "vqa", *sorted(last.delta)) if m in last.delta]

    def change(key) -> tuple:
        return tuple(rows["tuned"][key][m] - rows["base"][key][m] for m in judges)

    order = np.random.default_rng(seed).permutation(len(keys))
    ranked = sorted((keys[i] for i in order), key=change)  # equal changes stay in random order
    half = -(-count // 2)
    chosen = {
        "A random sample": _distinct((keys[i] for i in order), count),
        "Most improved": _distinct((k for k in reversed(ranked) if change(k)[0] > 0), half),
        "Most worsened": _distinct((k for k in ranked if change(k)[0] < 0), half),
    }
    wanted = {key for picked in chosen.values() for key in picked}
    folders = {"base": last.base_evals / "base", "tuned": last.folder / "evals" / "tuned"}
    images = {name: read_images(folder, wanted) for name, folder in folders.items()}
    answers = {name: {} for name in last.answers}
    for name, table in last.answers.items():
        for row in table:
            answers[name].setdefault((row["prompt_id"], row["candidate"]), []).append(row)

    def example(key) -> dict:
        sides = {
            name: {
                "png": images[name][key],
                "scores": rows[name][key],
                "answers": answers[name].get(key, []),
            }
            for name in ("base", "tuned")
        }
        return {"prompt": last.prompts[key[0]], **sides}

    whole = images["base"].keys() & images["tuned"].keys()
    return {
        heading: [example(key) for key in picked if key in whole]
        for heading, picked in chosen.items()
    }


def _distinct(keys, count: int) -> list:
    """The first `count` keys with different prompts."""
    first = {}
    for key in keys:
        first.setdefault(key[0], key)
        if len(first) == count:
            break
    return list(first.values())


def read_images(folder: Path, wanted: set) -> dict[tuple[str, int], bytes]:
    """PNG bytes of the wanted (prompt_id, candidate) in a folder of candidate shards."""
    images = {}
    for shard in sorted(folder.glob("*.tfrecord")):
        fields = ["prompt_id", "candidate", "image"]
        for row in records.read_shard(shard, records.CANDIDATE_FEATURES, fields):
            if (row["prompt_id"], row["candidate"]) in wanted:
                images[row["prompt_id"], row["candidate"]] = row["image"]
    return images


def pick_pairs(source: SimpleNamespace) -> dict[str, list[dict]]:
    """{heading: pairs}: the largest and the smallest margins, with images and all scores."""
    ranked = source.pair_rows
    count = min(PAIRS_SHOWN, -(-len(ranked) // 2))
    chosen = {
        "Largest margins": ranked[:count],
        "Smallest margins": ranked[max(count, len(ranked) - count) :],
    }
    wanted = {
        (pair["prompt_id"], pair[f"{side}_candidate"])
        for pairs in chosen.values()
        for pair in pairs
        for side in ("chosen", "rejected")
    }
    images = read_images(source.folder / "candidates", wanted) if wanted else {}
    scores = {}
    if wanted and any((source.folder / "scores").glob("[0-9]*.parquet")):
        for row in records.read_parquet(source.folder / "scores" / "[0-9]*.parquet"):
            scores[row["prompt_id"], row["candidate"]] = row
    for pair in (pair for pairs in chosen.values() for pair in pairs):
        for side in ("chosen", "rejected"):
            key = pair["prompt_id"], pair[f"{side}_candidate"]
            pair[f"{side}_image"] = images.get(key)
            pair[f"{side}_scores"] = scores.get(key, {})
    return {
        heading: [p for p in pairs if p["chosen_image"] and p["rejected_image"]]
        for heading, pairs in chosen.items()
    }
