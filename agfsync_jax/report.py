"""Report: a workdir -> report.html for a person, summary.json for a script, before_after.png.

Shows what the workdir holds so far, every round of it, and lists what is missing. report.html needs
no network and no scripts. It says in words whether the tuned model is better, and warns when the
score that made the pairs rises while the independent referee does not.

With --stage=pair: round_NNN/pairs.html, a gallery to judge the pairs by before training on them.
"""

import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import jax

from agfsync_jax.data import records
from agfsync_jax.parallel import multihost
from agfsync_jax.reports import findings, gallery, pages, panels
from agfsync_jax.reports import rounds as past
from agfsync_jax.reports.candidates import read_gallery
from agfsync_jax.utils.files import absolute, to_path

PACKAGES = ("agfsync_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SHEET = {"A random sample": 8, "Most improved": 4}  # what before_after.png shows


def main(
    config, workdir: Path, *, round_index: int = 0, repair: bool = False, stage: str = ""
) -> None:
    """Writes the three files, of all rounds; with stage="pair" the gallery of round `round_index`.

    Raises:
        FileNotFoundError: no round there, or for the gallery no pairs.
    """
    del repair
    if not multihost.is_main():
        return
    workdir = to_path(workdir)
    if stage == "pair":
        write_gallery(config, workdir, workdir / f"round_{round_index:03d}")
    else:
        write_report(config, workdir)


def write_gallery(config, workdir: Path, round_dir: Path) -> None:
    """Writes pairs.html into the round's folder, as soon as there are pairs."""
    source = read_gallery(round_dir, config.report.num_examples, config.seed)
    told = findings.tally(source)
    sections = [
        gallery.title(absolute(workdir).name, f"round {int(round_dir.name[-3:])}"),
        gallery.headline(source, told),
        gallery.dropped(source, told),
        gallery.distributions(source, told),
        gallery.correlations(source, told),
        gallery.answers(source),
        gallery.examples(source),
    ]
    _write_page(round_dir / "pairs.html", "AGFSync pairs", sections)


def _write_page(path: Path, title: str, sections: list[str]) -> None:
    page = pages.page(title, "\n".join(sections)).encode()
    records.write_file(path, [page])
    print(f"report: {path} ({records.megabytes(len(page))})", flush=True)


def write_report(config, workdir: Path) -> None:
    """Writes report.html, summary.json and before_after.png; every round is shown."""
    folders = sorted(workdir.glob("round_[0-9][0-9][0-9]"))
    if not folders:
        raise FileNotFoundError(f"no round_000 in {workdir}; `agfsync run` or a verb makes it")
    rounds = [past.read_round(folder, folders[0] / "evals") for folder in folders]
    summary = summarize(rounds)
    records.write_file(workdir / "summary.json", [json.dumps(summary, indent=2).encode(), b"\n"])

    judged = [r for r in rounds if r.delta]
    last = judged[-1] if judged else rounds[-1]
    examples = past.pick_examples(last, config.report.num_examples, config.seed) if judged else {}
    if any(examples.values()):
        stream = io.BytesIO()
        pages.contact_sheet(sheet_groups(examples)).save(stream, "PNG", optimize=True)
        records.write_file(workdir / "before_after.png", [stream.getvalue()])
    shown = next((r for r in reversed(rounds) if r.pair_rows), rounds[-1])
    missing = {r.label: r.missing for r in rounds if r.missing}
    settings = workdir / "config.json"  # unlike `config` without secrets
    sections = [
        panels.title(absolute(workdir).name, len(rounds), summary["device"]),
        panels.verdict_card(*verdict(last, len(judged))),
        panels.headline(last.base, last.tuned, last.delta, last.win_rate, last.rows["tuned"]),
        panels.missing(missing),
        panels.round_by_round(judged[0].base, {r.label: r for r in judged}) if judged else "",
        panels.before_and_after(examples),
        panels.elements(last.rows, last.answers),
        panels.distributions(last.rows["base"], last.rows["tuned"]),
        panels.training({r.label: r.curve for r in rounds if r.curve}),
        panels.pairs(past.pick_pairs(shown), shown.counts, shown.label),
        panels.costs({r.label: r.stages for r in rounds if r.stages}),
        panels.setting(settings.read_text() if settings.exists() else "", summary["versions"]),
    ]
    _write_page(workdir / "report.html", "AGFSync report", sections)


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
