"""Bench: throughput and memory on this machine, beside the usual tools on the same work.

--stage=load times loading a model's files, --stage=sample draws batches of images, --stage=train
takes steps of Diffusion-DPO: all with `config.bench.model`'s sizes and random weights.
--stage=score answers questions about images and gives CLIP and aesthetic scores, with the models of
`config.scorers`. Told are images, questions or pairs a second, seconds per step of the denoiser or
of the training, model FLOP utilization, peak memory, seconds of compiling.

--against measures a peer too. diffusers: its pipeline for load and sample, a loop around its UNet
for train, as fast as they are known to run (channels last, torch's scaled_dot_product_attention,
torch.compile on a GPU). reference, for score: the procedure of AGFSync's and TIFA's released code
(one image and one question a call of transformers' `generate`; a loop over images for CLIP and the
aesthetic head). Both sides have the same files and settings, one device, and a process each; they
take turns.

The ratio is of speeds, ours to theirs, a pair of turns: above 1 is faster. Utilization is of the
device's bfloat16 peak (utils/flops.py), unknown for CPUs. Peak memory counts from before loading:
of the host for --stage=load and on CPUs, else of the device. Compiling is what the first batch
takes longer than the fastest one. Figures are kept in bench/STAGE-MODEL.json of the workdir, if one
is given; random weights are removed.
"""

import contextlib
import copy
import importlib.util
import statistics
import tempfile
from json import dumps
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend

from agfsync_jax.benches import Task
from agfsync_jax.data import records
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import flops, modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import is_url, to_path


def main(
    config: Any,
    workdir: Path | None,
    *,
    round_index: int = 0,
    repair: bool = False,
    stage: str = "load",
    against: str | None = None,
    json: bool = False,
) -> None:
    """Measures a stage, prints a table and, with `json`, one line of JSON.

    Raises:
        ValueError: settings that cannot be; a side that failed; not Linux, whose /proc tells the
            memory.
        OSError: no space left for the weights.
    """
    config, platform = copy.deepcopy(config), jax.default_backend()
    bench = modules.load("benches", stage)
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("agfsync bench reads peak memory from /proc: it runs on Linux")
    if config.bench.repeats < 1:
        raise ValueError(f"config.bench.repeats={config.bench.repeats}: expected at least 1")
    if against not in (None, *bench.PEERS):
        raise ValueError(
            f"--against={against}: expected {' or '.join(bench.PEERS)}, or nothing, with"
            f" --stage={stage}"
        )
    bench.check(config, against, platform)
    for library in bench.LIBRARIES if against else ():
        if not importlib.util.find_spec(library):
            raise ValueError(
                f"--against={against} needs {library}: pip install 'agfsync_jax[torch]'"
            )
    if not multihost.is_main():
        return
    config.bench.dtype = config.bench.dtype or ("float32" if platform == "cpu" else "bfloat16")
    if platform != "cpu":  # the device goes to those that are measured
        jax.extend.backend.clear_backends()
        jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        parent = to_path(workdir) if workdir else None
        if parent is None or is_url(parent):  # models with random weights are made on this disk
            temporary = tempfile.TemporaryDirectory(prefix="agfsync-")
            home = Path(stack.enter_context(temporary)) / "bench"
        else:
            home = parent / "bench"
        clock = stack.enter_context(Stage(home, "bench", unit=bench.UNIT))
        measured = bench.measure(config, home, against, clock)
        sides = ["agfsync", *([against] if against else [])]
        device = measured.about["device"]
        results = {t.name: _result(t, sides, device=device) for t in measured.tasks}
        result: dict[str, Any] = {"stage": stage}
        result |= next(iter(results.values()))
        result |= {"tasks": results} if len(results) > 1 else {}
        result |= measured.about
        if workdir:
            turns = {t.name: t.rows for t in measured.tasks}
            kept = {"settings": measured.settings, "turns": turns.get("", turns), "result": result}
            text = dumps(kept, indent=2) + "\n"
            name = f"{stage}-{measured.label}.json"
            records.write_file(to_path(workdir) / "bench" / name, [text.encode()])
    for task in measured.tasks:
        print(table(task, results[task.name], device, against))
    if json:
        print(dumps(result))


def _result(task: Task, sides: list[str], *, device: str) -> dict:
    """Each side's median speed and largest peak, and the ratio of speeds a pair of turns."""
    turns = {side: [row for row in task.rows if row["by"] == side] for side in sides}
    peak = flops.peak(device)

    def figures(turns):
        def median(key):
            return statistics.median(row[key] for row in turns) if key in turns[0] else None

        seconds, step = median("seconds"), median("step_seconds")
        first = median("first_seconds")
        fastest = min(row["seconds"] for row in turns)
        return {
            "items_per_second": task.items / seconds,
            "seconds_per_step": step,
            "mfu": task.flop / seconds / peak if task.flop and peak else None,
            "peak_bytes": max(row["peak_bytes"] for row in turns),
            "compile_seconds": None if first is None else max(first - fastest, 0.0),
        }

    ours, *peers = (figures(each) for each in turns.values())
    ratio = None
    if peers:
        pairs = zip(*turns.values(), strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"ours": ours, "peer": peers[0] if peers else None, "ratio": ratio}


def table(task: Task, result: dict, device: str, against: str | None = None) -> str:
    """Markdown: a row a side, and below it the ratio of their speeds."""
    columns = {
        "items_per_second": (f"{task.unit}/s", "{:.4g}"),
        "seconds_per_step": ("s/step", "{:.4g}"),
        "mfu": ("MFU", "{:.1%}"),
        "peak_bytes": ("peak GB", "{:.2f}"),
        "compile_seconds": ("compile s", "{:.1f}"),
    }
    sides = {
        name: side | {"peak_bytes": side["peak_bytes"] / 1e9}
        for name, side in (("agfsync", result["ours"]), (against, result["peer"]))
        if side
    }
    columns = {
        key: column
        for key, column in columns.items()
        if any(side[key] is not None for side in sides.values())
    }
    rows = [[device, *(head for head, _ in columns.values())], ["---"] * (1 + len(columns))]
    for name, side in sides.items():
        cells = [(side[key], form) for key, (_, form) in columns.items()]
        rows.append([name, *("" if v is None else form.format(v) for v, form in cells)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if ratio := result["ratio"]:
        lines += ["", "agfsync / {}: {median:.2f} times as fast ({min:.2f} to {max:.2f})"]
        lines[-1] = lines[-1].format(against, **ratio)
    head = [f"{task.name}:", ""] if task.name else []
    return "\n".join([*head, *lines, *task.notes, *([""] if task.name else [])])
