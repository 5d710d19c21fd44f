"""Report: a workdir -> report.html for a person, summary.json for a script, before_after.png.

Shows what the workdir holds so far, every round of it, and lists what is missing. report.html needs
no network and no scripts. It says in words whether the tuned model is better, and warns when the
score that made the pairs rises while the independent judge does not.

With --stage=pair: round_NNN/pairs.html alone, a gallery to judge the pairs by before training on
them. The report, which links them, writes it for every round that has pairs.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path

import jax

from agfsync_jax.data import records
from agfsync_jax.data.columns import without_parts
from agfsync_jax.parallel import multihost
from agfsync_jax.reports import formats, pages, sheet
from agfsync_jax.reports.candidates import Gallery, read_gallery
from agfsync_jax.reports.examples import pick_examples
from agfsync_jax.reports.rounds import Report, read_report
from agfsync_jax.scoring.columns import columns_of
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


def write_gallery(config, workdir: Path, round_dir: Path) -> Gallery:
    """Writes pairs.html into the round's folder, as soon as there are pairs."""
    columns = columns_of(config)
    gallery = read_gallery(round_dir, columns, config.report.num_examples, config.seed)
    facts = [absolute(workdir).name, gallery.label]
    _write(round_dir / "pairs.html", pages.render("pairs", "AGFSync pairs", facts, gallery))
    return gallery


def write_report(config, workdir: Path) -> None:
    """Writes report.html, summary.json, before_after.png, and the galleries it links."""
    columns = columns_of(config)
    judges = [name for name in columns if name.split("/")[0] not in config.scorers]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
    report = read_report(workdir, columns, judges, device=device, versions=_versions())
    text = json.dumps(summarize(report), indent=2)
    records.write_file(workdir / "summary.json", [text.encode(), b"\n"])

    report.examples = pick_examples(report, config.report.num_examples, config.seed)
    if any(report.examples.values()):
        stream = io.BytesIO()
        sheet.draw(_cards(report)).save(stream, "PNG")
        records.write_file(workdir / "before_after.png", [stream.getvalue()])
    links = []
    for each in (each for each in report.rounds if each.has_pairs):
        report.gallery = write_gallery(config, workdir, each.folder)
        links.append((f"{each.folder.name}/pairs.html", f"pairs of {each.label}"))
    page = pages.render("report", "AGFSync report", report.facts, report, links)
    _write(workdir / "report.html", page)


def _write(path: Path, page: str) -> None:
    data = page.encode()
    records.write_file(path, [data])
    print(f"report: {path} ({records.megabytes(len(data))})", flush=True)


def summarize(report: Report) -> dict:
    """The figures of the report, for scripts; null or {} stands for what is not there yet."""
    rounds = [
        {
            "stages": each.stages,
            "pairs": each.counts.get("pairs"),
            "ties_dropped": each.counts.get("ties"),
            "base": each.base,
            "tuned": each.tuned,
            "delta": each.delta,
            "win_rate": each.win_rate,
        }
        for each in report.rounds
    ]
    return {"rounds": rounds, "device": report.device, "versions": report.versions}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a checkout
            versions[name] = importlib.metadata.version(name)
    return versions


def _cards(report: Report) -> dict[str, list[tuple[str, sheet.Side, sheet.Side]]]:
    """The first examples for the contact sheet, each with its judge's score."""

    def side(name: str, part: dict) -> sheet.Side:
        names = without_parts(part["scores"])
        column = next(each for each in report.columns if each in names)
        score = formats.number(report.columns[column], part["scores"][column])
        return part["png"], f"{name}: {column} {score}"

    return {
        heading: [
            (each["prompt"], side("base", each["base"]), side("tuned", each["tuned"]))
            for each in report.examples[heading][:count]
        ]
        for heading, count in SHEET.items()
    }
