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
import tempfile
from json import dumps
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend

from agfsync_jax.benches import Bench
from agfsync_jax.benches._results import figures, table
from agfsync_jax.data import records
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import modules
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
    bench = modules.load("benches", stage).BENCH
    check(bench, config, stage, against, platform)
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
            parent = Path(stack.enter_context(temporary))
        clock = stack.enter_context(Stage(parent / "bench", "bench", unit=bench.unit))
        measured = bench.measure(config, parent / "bench", against, clock)
    device = measured.about["device"]
    results = {t.name: figures(t, list(bench.sides(against)), device) for t in measured.tasks}
    result: dict[str, Any] = {"stage": stage} | next(iter(results.values()))
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


def check(bench: Bench, config: Any, stage: str, against: str | None, platform: str) -> None:
    """Raises ValueError for settings that cannot be, or a peer that is not installed."""
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("agfsync bench reads peak memory from /proc: it runs on Linux")
    if config.bench.repeats < 1:
        raise ValueError(f"config.bench.repeats={config.bench.repeats}: expected at least 1")
    if against not in (None, *bench.peers):
        raise ValueError(
            f"--against={against}: expected {' or '.join(bench.peers)}, or nothing, with"
            f" --stage={stage}"
        )
    bench.check(config, against, platform)
    for library in bench.libraries if against else ():
        if not importlib.util.find_spec(library):
            raise ValueError(
                f"--against={against} needs {library}: pip install 'agfsync_jax[torch]'"
            )
