"""The largest batch that fits: a search by few compilations, of which each may take minutes."""

from collections.abc import Callable
from typing import Any

import jax

from agfsync_jax.plans._estimates import estimate
from agfsync_jax.utils import modules


def largest_batch(config: Any, name: str, devices: list[jax.Device], row: dict[str, Any]) -> int:
    """A chip's largest batch; `row` is the estimate for the configured one."""
    block, key = modules.load("plans", row["verb"]).BATCH.split(".")
    one = max(1, config[block][key] // max(1, row["batch_per_chip"]))  # of the batch, one a chip

    def peak(size: int) -> int | None:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed[block][key] = size * one
        return estimate(changed, name, devices, row["verb"])["bytes_per_chip"]

    found = {row["batch_per_chip"]: row["bytes_per_chip"]}
    return search(peak, found, row["hbm_bytes"], row["unit"])


def search(
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
