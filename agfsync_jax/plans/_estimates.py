"""What a verb takes on some chips, from the program compiled for them: memory, FLOP, time."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from agfsync_jax.parallel import multihost
from agfsync_jax.plans import Work, _chips, param_bytes
from agfsync_jax.plans._programs import Cost, Program
from agfsync_jax.plans._tables import gib, number, too_large
from agfsync_jax.utils import flops, modules

KEYS = (
    *("topology", "verb", "chips", "batch_per_chip", "largest_batch_per_chip", "fits"),
    *("param_bytes", "optimizer_bytes", "bytes_per_chip", "hbm_bytes"),
    *("flops_per_step", "analytic_flops_per_step", "collective_bytes", "collective_bytes_by_axes"),
    *("step_seconds", "bound", "mfu", "hours"),
)


def estimate(config: Any, name: str, devices: list[jax.Device], verb: str) -> dict[str, Any]:
    """The row of one topology and verb: `KEYS`, and "rate", "notes" and "unit", a batch's step."""
    say = _progress(f"{name}, {verb}")
    work = modules.load("plans", verb).work(config, devices, name)
    mesh, chip = work.mesh, _chips.chip(devices[0])
    batch = work.images * mesh.shape["tensor"] // mesh.size
    row = dict.fromkeys(KEYS) | {
        "topology": name,
        "verb": verb,
        "chips": len(devices),
        "batch_per_chip": batch,
        "param_bytes": param_bytes(work.params) - param_bytes(work.optimizer),
        "optimizer_bytes": param_bytes(work.optimizer),
        "hbm_bytes": _chips.memory(devices[0]),
        "analytic_flops_per_step": round(work.step_flops / mesh.size),
        "rate": None,
        "notes": list(work.notes),
        "unit": work.unit,
    }
    say(f"compiling, {batch} a chip")
    try:
        compiled, *beside = [lowered.compile() for lowered in (work.lowered, *work.beside)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say("does not fit")
        row |= {"fits": False, "bytes_per_chip": _bytes_asked(str(error))}
        row["notes"] += too_large(row, work)
        return row
    say("compiled")
    row["bytes_per_chip"] = max(_peak_bytes(each, work.params) for each in (compiled, *beside))
    if row["hbm_bytes"]:
        row["fits"] = row["bytes_per_chip"] <= row["hbm_bytes"]
        row["notes"] += [] if row["fits"] else too_large(row, work)
    step = step_cost(Program(compiled.as_text(), mesh.shape), work, mesh.size)
    row |= {
        "flops_per_step": step.flops,
        "collective_bytes": {},
        "collective_bytes_by_axes": dict(step.collectives),
    }
    for crossing, size in step.collectives.items():
        kind = crossing.partition(" ")[0]
        row["collective_bytes"][kind] = row["collective_bytes"].get(kind, 0) + size
    row["notes"] += [
        f"{count} calls of {target} do not tell their FLOP: they are missing in what is measured, "
        "and the time is by formula."
        for target, count in step.uncounted.items()
    ]
    if chip and (peak := flops.peak(devices[0].device_kind)):
        row |= roofline(row, step, work, peak, chip)
    say(f"{gib(row['bytes_per_chip'])} a chip, {number(row['step_seconds'], 1e-3)} ms a step")
    return row


def _bytes_asked(error: str) -> int | None:
    """What a program needs that the compiler refuses, as far as it says."""
    needed = re.search(r"([\d.]+)([KMGT])\)? (?:exceeds|of) ", error)
    return round(float(needed[1]) * 2 ** (10 * (1 + "KMGT".index(needed[2])))) if needed else None


def _peak_bytes(compiled: jax.stages.Compiled, params: Any) -> int:
    """Bytes a chip while the program runs: those too of parameters, its first argument, that it has
    no use for: they lie there all the same."""

    places, leaves = (
        jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
        for tree in (compiled.input_shardings[0][0], params)
    )
    memory = compiled.memory_analysis()
    return (
        param_bytes([x for x, place in zip(leaves, places, strict=True) if place is None])
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        - memory.alias_size_in_bytes
    )


def step_cost(program: Program, work: Work, num_devices: int) -> Cost:
    """Of one pass of the loop that does about what a step should; another one may decode.

    A trajectory of one step has no loop, a step by itself neither: then it is all of the program.
    """
    expected = work.step_flops / num_devices
    looped = work.looped and work.num_steps > 1
    return min(
        program.loops if looped else [program.cost],
        key=lambda cost: abs(math.log((cost.flops + 1) / (expected + 1))),
    )


def roofline(row: dict, step: Cost, work: Work, peak: float, chip: _chips.Chip) -> dict[str, Any]:
    """{"step_seconds", "bound", "mfu", "hours", "rate"}: arithmetic (`peak` FLOP/s), memory and
    network run at full speed, all at once, and the slowest counts."""
    seconds = {
        # A program's count leaves out products with padding, which take their time all the same.
        "compute": max(step.flops, row["analytic_flops_per_step"]) / peak,
        "memory": step.bytes_accessed / chip.memory_bandwidth,
        "network": step.collectives.total() / chip.network_bandwidth,
    }
    bound, copies = max(seconds, key=seconds.get), row["chips"] // work.mesh.size
    a_run = work.num_steps * seconds[bound] + work.rest_flops / work.mesh.size / peak
    return {
        "step_seconds": seconds[bound],
        "bound": bound,
        "mfu": row["analytic_flops_per_step"] / peak / seconds[bound],
        "hours": math.ceil(work.total / work.images / copies) * a_run / 3600,
        "rate": (work.rate[0], copies * work.rate[1] / a_run),
    }


def _progress(name: str) -> Callable[[str], None]:
    start = time.monotonic()

    def say(what: str) -> None:
        if multihost.is_main():
            print(f"[{time.monotonic() - start:4.0f} s] {name}: {what}", flush=True)

    return say
