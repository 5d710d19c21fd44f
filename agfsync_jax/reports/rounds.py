"""What rounds have left in a workdir, read back for a person to look at."""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.pairs import read_features, read_pairs
from agfsync_jax.reports import panels
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


def parsed(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def _read_pairs(folder: Path) -> list[dict]:
    """Pairs without arrays and images, the largest margin first."""
    if not (folder / "pairs" / "dataset_info.json").exists():
        return []
    columns = pair_columns(folder / "pairs")
    pairs = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return sorted(pairs, key=lambda pair: -pair["margin"])


def pair_columns(pairs: Path) -> dict[str, Sequence]:
    """What tells of pairs, one entry a pair each; of a ranking the best against the worst."""
    always = ("pair_id", "prompt_id", "prompt", "margin")
    sides = [f"{side}_{what}" for what in ("candidate", "score") for side in ("chosen", "rejected")]
    if "candidates" not in read_features(pairs):
        return read_pairs(pairs, (*always, *sides))
    found = read_pairs(pairs, (*always, "candidates", "scores"))
    for name, column in (("candidate", found["candidates"]), ("score", found["scores"])):
        for side, place in (("chosen", 0), ("rejected", -1)):
            found[f"{side}_{name}"] = np.array([values[place] for values in column])
    return found


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
        "A random sample": distinct((keys[i] for i in order), count),
        "Most improved": distinct((k for k in reversed(ranked) if change(k)[0] > 0), half),
        "Most worsened": distinct((k for k in ranked if change(k)[0] < 0), half),
    }
    wanted = {key for picked in chosen.values() for key in picked}
    folders = {"base": last.base_evals / "base", "tuned": last.folder / "evals" / "tuned"}
    images = {
        name: read_images(sorted(folder.glob("*.tfrecord")), wanted)
        for name, folder in folders.items()
    }
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


def distinct(keys, count: int) -> list:
    """The first `count` keys with different prompts."""
    first = {}
    for key in keys:
        first.setdefault(key[0], key)
        if len(first) == count:
            break
    return list(first.values())


def read_images(paths: Sequence[Path], wanted: Collection) -> dict[tuple[str, int], bytes]:
    """PNG bytes of the wanted (prompt_id, candidate) in shards of candidates."""
    images = {}
    for path in paths:
        fields = ["prompt_id", "candidate", "image"]
        for row in records.read_shard(path, records.CANDIDATE_FEATURES, fields):
            if (row["prompt_id"], row["candidate"]) in wanted:
                images[row["prompt_id"], row["candidate"]] = row["image"]
    return images


def _read_stored(pairs: Path, wanted: Collection) -> dict[tuple[str, int], bytes]:
    """The PNGs of the wanted (pair_id, candidate) that lie with the pairs themselves."""
    features, images = read_features(pairs), {}
    for name, candidate in (
        ("chosen_image", "chosen_candidate"),
        ("rejected_image", "rejected_candidate"),
        ("images", "candidates"),
    ):
        for path in sorted(pairs.glob("*.tfrecord-*")) if name in features else []:
            for row in records.read_shard(path, features, ["pair_id", candidate, name]):
                pngs = row[name] if name == "images" else [row[name]]
                numbers = np.atleast_1d(row[candidate]).tolist()
                for number, png in zip(numbers, pngs, strict=True):
                    if (row["pair_id"], number) in wanted:
                        images[row["pair_id"], number] = png
    return images


def find_images(
    folder: Path, wanted: Collection[tuple[str, str, int]], shards: Mapping[str, str]
) -> dict[tuple[str, int], bytes]:
    """PNGs of (pair_id, prompt_id, candidate): drawn here, else stored with the pairs.

    Args:
        folder: of the round.
        shards: prompt_id -> the name of the shard that holds its candidates.

    Returns:
        (pair_id, candidate) -> PNG, of those that are there.
    """
    names = sorted({shards[prompt] for _, prompt, _ in wanted if prompt in shards})
    paths = [folder / "candidates" / f"{name}.tfrecord" for name in names]
    keys = {(prompt, candidate) for _, prompt, candidate in wanted}
    drawn = read_images([path for path in paths if path.exists()], keys)
    images = {(pair, c): drawn[prompt, c] for pair, prompt, c in wanted if (prompt, c) in drawn}
    left = {(pair, c) for pair, _, c in wanted} - images.keys()
    return images | (_read_stored(folder / "pairs", left) if left else {})


def read_scored(folder: Path) -> SimpleNamespace:
    """The scores of a round, one entry a candidate; nothing where there are none.

    Returns:
        numbers: prompt_id -> 0, 1, 2, ...
        shards: prompt_id -> name of its shard.
        rows: (prompt_id, candidate) -> its place in what follows.
        prompts, candidates: int [n], the prompt by its number.
        columns: {name: float64 [n]}, NaN where there is no score.

    Raises:
        ValueError: shards with different columns.
    """
    numbers, shards, rows, prompts = {}, {}, {}, []
    columns = defaultdict(list)
    for path in sorted((folder / "scores").glob("[0-9]*.parquet")):
        table = records.read_table(path)
        ids, candidates = (table[name].to_pylist() for name in ("prompt_id", "candidate"))
        for key in zip(ids, candidates, strict=True):
            rows[key] = len(rows)
            shards[key[0]] = path.stem
            prompts.append(numbers.setdefault(key[0], len(numbers)))
        names = set(table.column_names) - {"prompt_id", "candidate"}
        if columns and names != set(columns):
            raise ValueError(
                f"{path} has the columns {', '.join(sorted(names))}, the shards before it have"
                f" {', '.join(sorted(columns))}: remove the stale ones and run `agfsync score`."
            )
        for name in names:
            columns[name].append(np.asarray(table[name].to_numpy(), np.float64))
    return SimpleNamespace(
        numbers=numbers,
        shards=shards,
        rows=rows,
        prompts=np.array(prompts, int),
        candidates=np.array([candidate for _, candidate in rows], int),
        columns={name: np.concatenate(columns[name]) for name in panels.in_order(columns)},
    )


def pick_pairs(source: SimpleNamespace) -> dict[str, list[dict]]:
    """{heading: pairs}: the largest and the smallest margins, with images and all scores."""
    ranked = source.pair_rows
    count = min(PAIRS_SHOWN, -(-len(ranked) // 2))
    chosen = {
        "Largest margins": ranked[:count],
        "Smallest margins": ranked[max(count, len(ranked) - count) :],
    }
    wanted = {
        (pair["pair_id"], pair["prompt_id"], int(pair[f"{side}_candidate"]))
        for pairs in chosen.values()
        for pair in pairs
        for side in ("chosen", "rejected")
    }
    scored = read_scored(source.folder)
    images = find_images(source.folder, wanted, scored.shards) if wanted else {}
    for pair in (pair for pairs in chosen.values() for pair in pairs):
        for side in ("chosen", "rejected"):
            candidate = int(pair[f"{side}_candidate"])
            row = scored.rows.get((pair["prompt_id"], candidate))
            pair[f"{side}_image"] = images.get((pair["pair_id"], candidate))
            pair[f"{side}_scores"] = {} if row is None else scores_at(scored, row)
    return {
        heading: [p for p in pairs if p["chosen_image"] and p["rejected_image"]]
        for heading, pairs in chosen.items()
    }


def scores_at(scored: SimpleNamespace, row: int) -> dict[str, float]:
    """One row of the columns of `read_scored`."""
    return {name: float(column[row]) for name, column in scored.columns.items()}
