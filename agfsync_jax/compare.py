"""Compare: finished workdirs side by side, in a table, compare.html and compare.json.

    agfsync compare runs/one runs/other [--against=runs/one] [--output=DIR]

Of each run's last evaluation: the tuned model's scores, their paired difference to the base's, win
rates. Where runs were judged on the same prompts and seeds, which their prompts and the scores of
their base tell, the tuned models are compared image by image with those of the first run, or of
--against. All with 95% bootstrap intervals over prompts. Runs that differ in train.seed alone are
summed up: the mean over them, the lowest and the highest. compare.html has their learning curves.

What differs in the runs' configs names them. Nothing is drawn, and no device is used.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from agfsync_jax.data import records
from agfsync_jax.reports import formats, pages
from agfsync_jax.reports.runs import Comparison, read_comparison
from agfsync_jax.scoring.columns import columns_of
from agfsync_jax.steps.settings import is_run_time
from agfsync_jax.utils.files import absolute, is_url, to_path
from agfsync_jax.utils.statistics import aligned, digits, format_interval


def main(
    config: None,
    workdir: None,
    *,
    round_index: int = 0,
    repair: bool = False,
    workdirs: Sequence[str] = (),
    against: str = "",
    output: str = ".",
) -> None:
    """Prints the table and writes both files into `output`.

    Raises:
        FileNotFoundError, ValueError: what is no workdir, unfinished or damaged.
    """
    del config, workdir, round_index, repair
    named = [to_path(each) for each in (*workdirs, *([against] if against else ()))]
    places = [os.path.normpath(absolute(each)) for each in named]
    folders = dict(zip(places, named, strict=True))  # each once
    found = read_comparison(
        list(folders.values()),
        list(folders).index(places[-1] if against else places[0]),
        columns_of=lambda config: columns_of(ConfigDict(config)),
        is_run_time=is_run_time,
    )
    out = to_path(output)
    text = json.dumps(summarize(found), indent=2, ensure_ascii=False)
    records.write_file(out / "compare.json", [text.encode(), b"\n"])
    reports = [each.folder / "report.html" for each in found.runs]
    links = [
        (str(path) if is_url(path) or is_url(out) else os.path.relpath(path, out), run.label)
        for path, run in zip(reports, found.runs, strict=True)
        if path.exists()
    ]
    facts = [formats.count(len(found.runs), "run"), *found.reference.report.facts[1:3]]
    page = pages.render("compare", "AGFSync runs", facts, found, links).encode()
    records.write_file(out / "compare.html", [page])
    print("\n".join(table(found)))
    print(f"compare: {out / 'compare.html'}", flush=True)


def summarize(found: Comparison) -> dict[str, Any]:
    """The figures, for scripts."""
    runs = [
        {
            "workdir": str(run.folder),
            "label": run.label,
            "differs": dict(run.differs),
            "base": run.last.base,
            "tuned": run.last.tuned,
            "delta": run.last.delta,
            "win_rate": run.last.win_rate,
            "against": run.against,
            "unpaired": run.unpaired,
        }
        for run in found.runs
    ]
    groups = [
        {
            "label": each.label,
            "workdirs": [str(run.folder) for run in each.runs],
            "tuned": each.tuned,
            "delta": each.delta,
        }
        for each in found.groups
    ]
    return {"reference": str(found.reference.folder), "runs": runs, "groups": groups}


def table(found: Comparison) -> Iterator[str]:
    """Lines: a table a score, and why runs are not compared."""
    for name in found.columns:
        head = (name, "tuned", "tuned - base", "win rate", "tuned - reference")
        rows = [head]
        for run in found.runs:
            last = run.last
            if name not in last.delta:
                continue
            shown = digits(last.delta[name])
            against = "reference" if run is found.reference else ""
            if name in run.against:
                against = format_interval(run.against[name], shown, signed=True)
            cells = (
                format_interval(last.tuned[name], shown),
                format_interval(last.delta[name], shown, signed=True),
                format_interval(last.win_rate[name]),
            )
            rows.append((run.label, *cells, against))
        for each in found.groups:
            if name in each.tuned:
                shown = digits(each.delta[name])
                tuned = format_interval(each.tuned[name], shown)
                delta = format_interval(each.delta[name], shown, signed=True)
                rows.append((f"{each.label}: mean [lowest, highest]", tuned, delta, "", ""))
        yield from (*aligned(rows), "")
    for run in found.runs:
        if run.unpaired:
            yield f"{run.label} is not compared with the reference: {run.unpaired}"
