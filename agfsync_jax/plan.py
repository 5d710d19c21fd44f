"""Plan: does a stage fit these chips, and how long would it take? Compiled ahead of time.

    agfsync plan --config=configs/sd15.py --topologies=v5e:4x4,v5p:2x2x4,v6e:4x4 [--json]

compiles what `agfsync sample` (or --verb=score, train, or all three) would run for chips that need
not be here: a host with libtpu (`pip install jax[tpu]`) is enough, and `JAX_PLATFORMS=cpu` leaves a
TPU that is here alone. Without a topology it is for the devices that are here. --largest looks for
the largest batch that fits, and compiles some more programs for it. Weights are not read: where
config.backbone.path is not on this disk, config.backbone.kind says the sizes, and of a BLIP-2 its
name does. `config.train.batch_size` is of all chips together, `device_batch_size` of sample, score
and train of one. A large model takes minutes a topology; with
JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 in the environment it takes less, and the program may be
a little larger and slower than the one that will run.

Memory, FLOP and collectives are read from the compiled program; time is the most that the chips'
published numbers allow, so hours are a lower bound and MFU is an upper one: arithmetic, memory and
network at full speed, all at once, of which the slowest counts (Williams et al., "Roofline", 2009).
"""

import json as json_lib
from pathlib import Path
from typing import Any

import jax

from agfsync_jax.parallel import multihost
from agfsync_jax.plans import _chips
from agfsync_jax.plans._batches import largest_batch
from agfsync_jax.plans._estimates import KEYS, estimate
from agfsync_jax.plans._tables import table
from agfsync_jax.utils import modules


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
    chips = {name: _chips.devices(name) for name in names}
    if not names:
        here = jax.devices()
        chips = {f"{len(here)} x {here[0].device_kind} here": here}
    rows = []
    for name, devices in chips.items():
        for each in modules.names("plans") if verb == "all" else (verb,):
            row = estimate(config, name, devices, each)
            if largest and row["bytes_per_chip"] and row["hbm_bytes"]:
                row["largest_batch_per_chip"] = largest_batch(config, name, devices, row)
            rows.append(row)
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
