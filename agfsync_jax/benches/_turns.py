"""This package as a side, and the turns that it takes with its peers."""

import contextlib
import itertools
import os
from collections.abc import Callable, Sequence

import jax

from agfsync_jax.benches import Sides, Task
from agfsync_jax.benches._processes import Process, processor_name
from agfsync_jax.benches._sides import Side
from agfsync_jax.utils.clock import Stage

_TOLD = {"seconds": "{:.2f} s", "step_seconds": "{:.3f} s a step", "loss": "loss {:.4f}"}


class Ours(Side):
    """What the stages' own classes share."""

    libraries = ("jax", "flax")

    def __init__(self):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves the peer its part of a GPU
        jax.config.update("jax_enable_compilation_cache", False)  # its time is a figure
        self.device = jax.local_devices()[0]
        jax.device_put(0.0).block_until_ready()

    def device_name(self) -> str:
        cpu = self.device.platform == "cpu"
        return processor_name() if cpu else self.device.device_kind

    def peak_bytes(self) -> int:
        found = self.device.memory_stats() or {}
        return found.get("peak_bytes_in_use") or self.memory.peak()


def in_turns(
    sides: Sides,
    tasks: Sequence[Task],
    clock: Stage,
    *,
    turns: int,
    items: int,
    start: Callable[[str, Callable], list[float]],
    turn: Callable[[str, Callable, Task, int], dict],
) -> dict[str, dict]:
    """Each side starts once and stays alive; then they take turns at every task.

    Args:
        tasks: whose rows are filled.
        items: of the clock, a turn.
        start: (side, its process's `ask`) -> loads and compiles; the seconds of each task's first
            run.
        turn: (side, `ask`, task, number from 1) -> a row.

    Returns:
        what each side is about.
    """
    ask, first, about = {}, {}, {}
    with contextlib.ExitStack() as stack, clock.progress(turns * items) as progress:
        for side, make in sides.items():
            ask[side] = stack.enter_context(Process(make, side)).ask
            first[side] = start(side, ask[side])
            about[side] = ask[side]("about")
            clock.print(f"{side}: the first run took {sum(first[side]):.1f} s")
        for number in range(1, 1 + turns):
            for (index, task), side in itertools.product(enumerate(tasks), sides):
                row = turn(side, ask[side], task, number)
                task.rows.append({"by": side, "first_seconds": first[side][index], **row})
                told = ", ".join(form.format(row[k]) for k, form in _TOLD.items() if k in row)
                clock.print(f"{side}: {task.items} {task.unit} in {told}")
            progress.update(items)
    return about
