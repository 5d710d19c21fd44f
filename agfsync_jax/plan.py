"""Plan: does a stage fit these chips, and how long would it take? Compiled ahead of time.

    agfsync plan --config=configs/sd15.py --topologies=v5e:4x4,v5p:2x2x4,v6e:4x4 [--json]

compiles what `agfsync sample` (or --verb=score, train, or all three) would run for chips that need
not be here: a host with libtpu (`pip install jax[tpu]`) is enough, and `JAX_PLATFORMS=cpu` leaves a
TPU that is here alone. Without a topology it is for the devices that are here. --largest looks for
the largest batch that fits, and compiles some more programs for it. Weights are not read: where
config.backbone.path is not on this disk, config.backbone.kind says the sizes, and of a BLIP-2 its
name does. `config.sample.batch_size` and `config.train.batch_size` are of all chips together,
`config.score.batch_size` is of those of a process. A large model takes minutes a topology; with
JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 in the environment it takes less, and the program may be
a little larger and slower than the one that will run.

Memory, FLOP and collectives are read from the compiled program; time is the most that the chips'
published numbers allow, so hours are a lower bound and MFU is an upper one: arithmetic, memory and
network at full speed, all at once, of which the slowest counts (Williams et al., "Roofline", 2009).
"""

import json as json_lib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from agfsync_jax.parallel import multihost, topologies
from agfsync_jax.parallel.sharding import path_string
from agfsync_jax.plans import Work
from agfsync_jax.utils import flops, modules


def main(
    config: Any,
    workdir: Path | None,
    *,
    round_index: int = 0,
    repair: bool = False,
    topology: str = "",
    verb: str = "sample",
    largest: bool = False,
    json: bool = False,
) -> None:
    """Compiles for each topology and prints a row each.

    Raises:
        ValueError: an unknown topology, no libtpu, or a config that the verb cannot run.
        FileNotFoundError: a model that is neither on this disk nor of a known kind.
    """
    names = [name.strip() for name in topology.split(",") if name.strip()]
    chips = {name: topologies.devices(name) for name in names}
    if not names:
        here = jax.devices()
        chips = {f"{len(here)} x {here[0].device_kind} here": here}
    verbs = ("sample", "score", "train") if verb == "all" else (verb,)
    rows = [
        plan(config, name, devices, each, largest)
        for name, devices in chips.items()
        for each in verbs
    ]
    if not multihost.is_main():
        return
    print(table(rows))
    for name in chips if verb == "all" else ():
        own = [row for row in rows if row["topology"] == name]
        if None not in [row["hours"] for row in own]:
            hours = ", ".join(f"{row['verb']} {row['hours']:.3g}" for row in own)
            total = sum(row["hours"] for row in own)
            chip_hours = total * own[0]["chips"]
            print(f"{name}: a round of {total:.3g} hours ({hours}), {chip_hours:.3g} chip-hours.")
    for row in rows:
        for note in row["notes"]:
            print(f"{row['topology']}: {note}")
    print("Seconds and MFU are what the chips' published numbers allow at best, not a measurement.")
    if json:
        print(json_lib.dumps({"rows": [{key: row[key] for key in KEYS} for row in rows]}))


KEYS = (
    *("topology", "verb", "chips", "batch_per_chip", "largest_batch_per_chip", "fits"),
    *("param_bytes", "optimizer_bytes", "bytes_per_chip", "hbm_bytes"),
    *("flops_per_step", "analytic_flops_per_step", "collective_bytes", "collective_bytes_by_axes"),
    *("step_seconds", "bound", "mfu", "hours"),
)


def plan(
    config: Any, name: str, devices: list[jax.Device], verb: str, largest: bool = False
) -> dict[str, Any]:
    """The row of one topology and verb: `KEYS`, and what the table tells besides."""
    room = modules.load("plans", verb)
    row = _compile(config, name, devices, verb)
    if not largest or not row["bytes_per_chip"] or not row["hbm_bytes"]:
        return row
    block, key = room.BATCH.split(".")
    one = max(1, config[block][key] // max(1, row["batch_per_chip"]))  # of the batch, one a chip

    def peak(size: int) -> int | None:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed[block][key] = size * one
        return _compile(changed, name, devices, verb)["bytes_per_chip"]

    found = {row["batch_per_chip"]: row["bytes_per_chip"]}
    row["largest_batch_per_chip"] = largest_batch(peak, found, row["hbm_bytes"], row["unit"])
    return row


def largest_batch(
    peak: Callable[[int], int | None], found: dict[int, int], limit: int, unit: int = 1
) -> int:
    """The largest batch that takes no more than `limit` bytes, or one an eighth smaller at most.

    Args:
        peak: batch -> bytes; costs minutes. None where that is not known: too many.
        found: what is known already, one at least.
        unit: batches are its multiples.
    """
    fits = max((size for size, needed in found.items() if needed <= limit), default=0)
    fails = min((size for size, needed in found.items() if needed > limit), default=0)
    halve = False
    while not fails or fails - fits > max(unit, fits // 8):
        # Memory grows by about as much for each, so that two sizes tell of all; but not to the end,
        # where a compiler saves: if that did not bring it near, the middle does.
        guess = (fits + fails) // 2 if fails else 2 * fits
        ends = [size for size in (fits, fails) if size in found] if fails else sorted(found)[-2:]
        if len(ends) == 2 and not halve and found[ends[0]] < found[ends[1]]:
            each = (found[ends[1]] - found[ends[0]]) / (ends[1] - ends[0])
            guess = ends[0] + int((limit - found[ends[0]]) / each)
            guess = guess if fails else min(guess, 4 * fits)
        guess = max(guess, fits + unit) // unit * unit
        guess = min(guess, fails - unit) if fails else guess
        needed, gap = peak(guess), fails - fits
        if needed is not None:
            found[guess] = needed
        if needed is not None and needed <= limit:
            fits = guess
        else:
            fails = guess
        halve = gap > 0 and fails - fits > gap // 2
    return fits


def _compile(config: Any, name: str, devices: list[jax.Device], verb: str) -> dict[str, Any]:
    say = _progress(f"{name}, {verb}")
    work = modules.load("plans", verb).work(config, devices, name)
    mesh = work.mesh
    say(f"compiling, {work.images * mesh.shape['tensor'] // mesh.size} a chip")
    chip, kind = topologies.chip(devices[0]), devices[0].device_kind
    row = dict.fromkeys(KEYS) | {
        "topology": name,
        "verb": verb,
        "batch_per_chip": work.images * mesh.shape["tensor"] // mesh.size,
        "hbm_bytes": _memory(devices[0], chip),
        "analytic_flops_per_step": round(work.step_flops / mesh.size),
        "chips": mesh.size * work.copies,
        "param_bytes": param_bytes(work.params) - param_bytes(work.optimizer),
        "optimizer_bytes": param_bytes(work.optimizer),
        "hours": None,
        "rate": None,
        "notes": list(work.notes),
        "unit": work.unit,
    }
    try:
        compiled, *beside = [lowered.compile() for lowered in (work.lowered, *work.beside)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say("does not fit")
        needed = re.search(r"([\d.]+)([KMGT])\)? (?:exceeds|of) ", str(error))
        if needed:
            scale = 2 ** (10 * (1 + "KMGT".index(needed[2])))
            row["bytes_per_chip"] = round(float(needed[1]) * scale)
        return row | {"fits": False, "notes": row["notes"] + too_large(row, work)}
    say("compiled")
    row["bytes_per_chip"] = max(_peak_bytes(each, work.params) for each in (compiled, *beside))
    if row["hbm_bytes"]:
        row["fits"] = row["bytes_per_chip"] <= row["hbm_bytes"]
        if not row["fits"]:
            row["notes"] += too_large(row, work)
    step = step_cost(topologies.Program(compiled.as_text(), mesh.shape), work, mesh.size)
    by_kind: dict[str, int] = {}
    for crossing, size in step.collectives.items():
        collective = crossing.partition(" ")[0]
        by_kind[collective] = by_kind.get(collective, 0) + size
    row |= {
        "flops_per_step": step.flops,
        "collective_bytes": by_kind,
        "collective_bytes_by_axes": dict(step.collectives),
    }
    for target, count in step.uncounted.items():
        row["notes"].append(
            f"{count} calls of {target} do not tell their FLOP: they are missing in what is "
            "measured, and the time is by formula."
        )
    row |= estimate(row, step, work, flops.peak(kind), chip)
    say(f"{_gib(row['bytes_per_chip'])} a chip, {_number(row['step_seconds'], 1e-3)} ms a step")
    return row


def param_bytes(params: Any) -> int:
    """Bytes of a pytree on one device."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _peak_bytes(compiled: jax.stages.Compiled, params: Any) -> int:
    """Bytes a chip while the program runs: those too of parameters, its first argument, that it has
    no use for: they lie there all the same."""

    def is_none(x):
        return x is None

    places = jax.tree.leaves(compiled.input_shardings[0][0], is_leaf=is_none)
    leaves = zip(jax.tree.leaves(params, is_leaf=is_none), places, strict=True)
    memory = compiled.memory_analysis()
    return (
        param_bytes([leaf for leaf, place in leaves if place is None and leaf is not None])
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _memory(device: jax.Device, chip: topologies.Chip | None) -> int | None:
    """Bytes that a program may use: what a device that is here says, else the published number."""
    try:
        return device.memory_stats()["bytes_limit"]
    except (jax.errors.JaxRuntimeError, KeyError, TypeError):
        return chip.memory if chip else None


def step_cost(program: topologies.Program, work: Work, num_devices: int) -> topologies.Cost:
    """Of one pass of the loop that does about what a step should; another one may decode.

    A trajectory of one step has no loop, a step by itself neither: then it is all of the program.
    """
    expected = work.step_flops / num_devices

    def distance(cost):
        return abs(math.log((cost.flops + 1) / (expected + 1)))

    looped = work.looped and work.num_steps > 1
    return min(program.loops if looped else [program.cost], key=distance)


def estimate(
    row: dict, step: topologies.Cost, work: Work, peak: float | None, chip: topologies.Chip | None
) -> dict[str, Any]:
    """{"step_seconds", "bound", "mfu", "hours", "rate"}; None where the chip is not known."""
    if peak is None or chip is None:
        return dict.fromkeys(("step_seconds", "bound", "mfu", "hours", "rate"))
    seconds = {
        # A program's count leaves out products with padding, which take their time all the same.
        "compute": max(step.flops, row["analytic_flops_per_step"]) / peak,
        "memory": step.bytes_accessed / chip.memory_bandwidth,
        "network": step.collectives.total() / chip.network_bandwidth,
    }
    bound = max(seconds, key=seconds.get)
    a_run = work.num_steps * seconds[bound] + work.rest_flops / work.mesh.size / peak
    return {
        "step_seconds": seconds[bound],
        "bound": bound,
        "mfu": row["analytic_flops_per_step"] / peak / seconds[bound],
        "hours": math.ceil(work.total / work.images / work.copies) * a_run / 3600,
        "rate": (work.rate[0], work.copies * work.rate[1] / a_run),
    }


def too_large(row: dict, work: Work) -> list[str]:
    """What takes the memory, and what would help."""
    groups: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(work.params):
        names = [part for part in path_string(path).split(".") if not part.isdecimal()]
        name = ".".join(names[:2])
        groups[name] = groups.get(name, 0) + param_bytes(leaf)
    largest = sorted(groups.items(), key=lambda item: -item[1])[:4]
    told = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    rest, held = "", row["param_bytes"] + row["optimizer_bytes"]
    if row["bytes_per_chip"]:
        rest = (
            f"; activations and the rest, of a batch of {row['batch_per_chip']} a chip: "
            f"{_gib(row['bytes_per_chip'] - held)}"
        )
    needed = f"needs {_gib(row['bytes_per_chip'])} a chip" if row["bytes_per_chip"] else "too large"
    return [
        f"does not fit: {needed}, there are {_gib(row['hbm_bytes'])}. "
        f"Parameters and optimizer: {_gib(held)} ({told}){rest}.",
        f"would help: {'; '.join(work.help)}.",
    ]


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = {
        "topology": lambda r: r["topology"],
        "verb": lambda r: r["verb"],
        "chips": lambda r: str(r["chips"]),
        "batch a chip": lambda r: str(r["batch_per_chip"]),
        "largest": lambda r: str(r["largest_batch_per_chip"]),
        "parameters": lambda r: _gib(r["param_bytes"]),
        "optimizer": lambda r: _gib(r["optimizer_bytes"]),
        "peak a chip": lambda r: f"{_gib(r['bytes_per_chip'])} of {_gib(r['hbm_bytes'])}",
        "fits": lambda r: {True: "yes", False: "NO", None: "?"}[r["fits"]],
        "TFLOP a step": lambda r: _number(r["flops_per_step"], 1e12),
        "by formula": lambda r: _number(r["analytic_flops_per_step"], 1e12),
        "collectives a step": _collectives,
        "ms a step": lambda r: _number(r["step_seconds"], 1e-3),
        "bound by": lambda r: r["bound"] or "?",
        "MFU": lambda r: "?" if r["mfu"] is None else f"{r['mfu']:.0%}",
        "hours": lambda r: _number(r["hours"], 1),
        "a second": lambda r: "?" if r["rate"] is None else f"{r['rate'][1]:.3g} {r['rate'][0]}",
    }
    for column, key in (("largest", "largest_batch_per_chip"), ("optimizer", "optimizer_bytes")):
        if not any(row[key] for row in rows):
            del columns[column]
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _collectives(row: dict) -> str:
    found = row["collective_bytes_by_axes"]
    if found is None:
        return "?"
    return ", ".join(f"{kind} {size / 1e6:.3g} MB" for kind, size in found.items()) or "none"


def _gib(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.2f} MiB"


def _number(value: float | None, unit: float) -> str:
    return "?" if value is None else f"{value / unit:.3g}"


def _progress(name: str) -> Callable[[str], None]:
    start = time.monotonic()

    def say(what: str) -> None:
        if multihost.is_main():
            print(f"[{time.monotonic() - start:4.0f} s] {name}: {what}", flush=True)

    return say
