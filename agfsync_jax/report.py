"""Report: a workdir -> report.html for a person, summary.json for a script, before_after.png.

Shows what the workdir holds so far, every round of it, and lists what is missing. report.html needs
no network and no scripts. It says in words whether the tuned model is better, and warns when the
score that made the pairs rises while the independent referee does not.
"""

import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from agfsync_jax.data import records
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import pages, panels
from agfsync_jax.utils.clock import read_stages
from agfsync_jax.utils.metrics import read_metrics

PACKAGES = ("agfsync_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PAIRS_SHOWN = 4  # with the largest margin, and as many with the smallest
SHEET = {"A random sample": 8, "Most improved": 4}  # what before_after.png shows
# What a round leaves, and the verb that makes it.
PARTS = {
    "prompts.jsonl": "prompts",
    "candidates": "sample",
    "scores": "score",
    "pairs": "pair",
    "checkpoints": "train",
    "evals/comparison.json": "evaluate",
}


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Writes the three files; every round is shown, whatever `round_index` says."""
    del round_index, repair
    if not multihost.is_main():
        return
    workdir = Path(workdir)
    folders = sorted(workdir.glob("round_[0-9][0-9][0-9]"))
    if not folders:
        raise FileNotFoundError(f"no round_000 in {workdir}; `agfsync run` or a verb makes it")
    rounds = [read_round(folder, folders[0] / "evals") for folder in folders]
    summary = summarize(rounds)
    records.write_file(workdir / "summary.json", [json.dumps(summary, indent=2).encode(), b"\n"])

    judged = [r for r in rounds if r.delta]
    last = judged[-1] if judged else rounds[-1]
    examples = pick_examples(last, config.report.num_examples, config.seed) if judged else {}
    if examples:
        stream = io.BytesIO()
        pages.contact_sheet(sheet_groups(examples)).save(stream, "PNG", optimize=True)
        records.write_file(workdir / "before_after.png", [stream.getvalue()])
    shown = next((r for r in reversed(rounds) if r.pair_rows), rounds[-1])
    missing = {r.label: r.missing for r in rounds if r.missing}
    sections = [
        panels.title(workdir.absolute().name, len(rounds), summary["device"]),
        panels.verdict_card(*verdict(last, len(judged))),
        panels.headline(last.base, last.tuned, last.delta, last.win_rate, last.rows["tuned"]),
        panels.missing(missing),
        panels.round_by_round(judged[0].base, {r.label: r for r in judged}) if judged else "",
        panels.before_and_after(examples),
        panels.elements(last.rows, last.answers),
        panels.distributions(last.rows["base"], last.rows["tuned"]),
        panels.training({r.label: r.curve for r in rounds if r.curve}),
        panels.pairs(shown_pairs(shown), shown.counts, shown.label),
        panels.costs({r.label: r.stages for r in rounds if r.stages}),
        panels.setting(config.to_json(indent=2), summary["versions"]),
    ]
    page = pages.page("AGFSync report", "\n".join(sections)).encode()
    records.write_file(workdir / "report.html", [page])
    print(f"report: {workdir / 'report.html'} ({len(page) / 1e6:.1f} MB)", flush=True)


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
        missing=[f"{p} (`agfsync {v}`)" for p, v in PARTS.items() if not (folder / p).exists()],
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


def summarize(rounds: list[SimpleNamespace]) -> dict:
    """The figures of the report, for scripts; null or {} stands for what is not there yet."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout, or an optional part
    device = jax.devices()[0]
    return {
        "rounds": [
            {
                "stages": r.stages,
                "pairs": r.counts.get("pairs"),
                "ties_dropped": r.counts.get("ties"),
                "base": r.base,
                "tuned": r.tuned,
                "delta": r.delta,
                "win_rate": r.win_rate,
            }
            for r in rounds
        ],
        "device": f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} CPU cores",
        "versions": versions,
    }


def verdict(last: SimpleNamespace, num_rounds: int = 1) -> tuple[str, list[str]]:
    """What a comparison says, in plain words.

    Args:
        last: has base, tuned and delta, each {metric: {"mean", "low", "high"}}.

    Returns:
        "good", "bad", "warn" or "" (undecided), and sentences, the first of which is a headline.
    """

    def tell(metric: str) -> str:
        before, after = (panels.number(metric, m[metric]["mean"]) for m in (last.base, last.tuned))
        change = panels.number(metric, last.delta[metric]["mean"], signed=True)
        ends = panels.between(metric, last.delta[metric], signed=True)
        return f"{before} → {after}, {change} (95% interval {ends})"

    if not last.delta:
        return "", ["No evaluation yet: nothing can be said about the tuned model."]
    way = {metric: panels.direction(interval) for metric, interval in last.delta.items()}
    rounds = f"After {num_rounds} round{'s' * (num_rounds > 1)}"
    if "referee" not in way:
        judge = next(metric for metric in ("vqa", *way) if metric in way)
        head = {"up": "rises", "down": "falls", "": "does not clearly change"}[way[judge]]
        sentences = [
            f"{rounds} {judge} {head} on held-out prompts.",
            f"{judge}: {tell(judge)}.",
            "No independent referee judges these prompts, and the model was trained to please its "
            "scorers: look at the pictures before believing them.",
        ]
        return "bad" if way[judge] == "down" else "", sentences
    css, head = {
        "up": ("good", "the tuned model follows held-out prompts better than the base"),
        "down": ("bad", "the tuned model follows held-out prompts worse than the base"),
        "": ("", "no clear difference between the tuned model and the base"),
    }[way["referee"]]
    sentences = [f"{rounds}: {head}.", f"Checks that the referee finds true: {tell('referee')}."]
    if "referee_strict" in way:
        sentences[1] += f" Images in which all of them are: {tell('referee_strict')}."
    if way.get("vqa") == "up" and way["referee"] != "up":
        css = css or "warn"
        sentences.append(
            f"Warning: the VQA score rises, {tell('vqa')}, but the independent referee does not. "
            "The model may have learned to please its scorer and not to follow prompts: do not "
            "take the higher score for better pictures."
        )
    elif "vqa" in way:
        sentences.append(f"VQA score: {tell('vqa')}.")
    if way.get("aesthetic") == "down":
        sentences.append(f"The aesthetic score falls: {tell('aesthetic')}.")
    return css, sentences


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


def sheet_groups(examples: dict[str, list[dict]]) -> list:
    """The first examples for the contact sheet, each with its judge's score."""

    def side(name: str, part: dict) -> tuple[bytes, str]:
        metric = panels.metric_names([part["scores"]])[0]
        return part["png"], f"{name}: {metric} {panels.number(metric, part['scores'][metric])}"

    return [
        (
            heading,
            [
                (e["prompt"], side("base", e["base"]), side("tuned", e["tuned"]))
                for e in examples[heading][:n]
            ],
        )
        for heading, n in SHEET.items()
    ]


def shown_pairs(source: SimpleNamespace) -> dict[str, list[dict]]:
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
