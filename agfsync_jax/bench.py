"""Bench: throughput and memory on this machine, beside the usual tools on the same work.

--stage=load times loading a model's files, --stage=sample draws batches of images, --stage=train
takes steps of Diffusion-DPO: all with `config.bench.model`'s sizes and random weights.
--stage=score answers questions about images and gives CLIP and aesthetic scores, with the models of
`config.scorers`. --stage=duplicates finds near duplicates among `config.bench.num_texts` random
embeddings. Told are images, questions, pairs or texts a second, seconds per step of the denoiser or
of the training, model FLOP utilization, peak memory, seconds of compiling.

--against measures a peer too. diffusers: its pipeline for load and sample, a loop around its UNet
for train, as fast as they are known to run (channels last, torch's scaled_dot_product_attention,
torch.compile on a GPU). reference, for score: the procedure of AGFSync's and TIFA's released code
(one image and one question a call of transformers' `generate`; a loop over images for CLIP and the
aesthetic head); for duplicates: the definition in numpy, of at most 5,000 embeddings. Both sides
have the same files and settings, one device, and a process each; they take turns.

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
    sides = {name: made for name, made in bench.sides.items() if name in ("agfsync", against)}
    with contextlib.ExitStack() as stack:
        parent = to_path(workdir) if workdir else None
        if parent is None or is_url(parent):  # models with random weights are made on this disk
            temporary = tempfile.TemporaryDirectory(prefix="agfsync-")
            parent = Path(stack.enter_context(temporary))
        clock = stack.enter_context(Stage(parent / "bench", "bench", unit=bench.unit))
        tasks, about = bench.measure(config, parent / "bench", sides, clock)
    device = about["agfsync"]["device"]
    versions = {name: v for each in about.values() for name, v in each["versions"].items()}
    results = {task.name: figures(task, list(sides), device) for task in tasks}
    result: dict[str, Any] = {"stage": stage} | next(iter(results.values()))
    result |= {"tasks": results} if len(results) > 1 else {}
    result |= {"device": device, "versions": versions}
    if workdir:
        turns = {task.name: task.rows for task in tasks}
        settings = config.bench.to_dict()
        kept = {"settings": settings, "turns": turns.get("", turns), "result": result}
        name = f"{stage}-{bench.label or config.bench.model}.json"
        text = dumps(kept, indent=2) + "\n"
        records.write_file(to_path(workdir) / "bench" / name, [text.encode()])
    for task in tasks:
        print(table(task, results[task.name], device, against))
    if json:
        print(dumps(result))


def check(bench: Bench, config: Any, stage: str, against: str | None, platform: str) -> None:
    """Raises ValueError for settings that cannot be, or a peer that is not installed."""
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("agfsync bench reads peak memory from /proc: it runs on Linux")
    for key in ("repeats", *bench.counts):
        if config.bench[key] < 1:
            raise ValueError(f"config.bench.{key}={config.bench[key]}: expected at least 1")
    _, *peers = bench.sides
    if against not in (None, *peers):
        expected = f"expected {' or '.join(peers)}, or nothing, with --stage={stage}"
        raise ValueError(f"--against={against}: {expected}")
    bench.check(config)
    if bench.one_device and against and platform not in ("cpu", "gpu"):
        raise ValueError(f"--against={against} runs on a CPU or a GPU, and JAX on a {platform}")
    if bench.one_device and jax.process_count() > 1:
        raise ValueError(f"agfsync bench --stage={stage} measures one device: run one process")
    for library in bench.sides[against].libraries if against else ():
        if not importlib.util.find_spec(library):
            raise ValueError(
                f"--against={against} needs {library}: pip install 'agfsync_jax[torch]'"
            )
