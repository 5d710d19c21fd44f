"""What `agfsync bench --stage=NAME` measures: a stage a file, which exports BENCH, a `Bench`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Task(NamedTuple):
    """Something that both sides do, turn by turn.

    Attributes:
        name: of the task; empty where the stage has only one.
        unit: what is counted, in the plural.
        items: how many of it a turn does.
        flop: of a turn, 0 where it is not counted.
        rows: a dict a turn and side: by, seconds, peak_bytes; step_seconds and first_seconds of
            what has them.
        notes: what is to be said besides.
    """

    name: str
    unit: str
    items: int
    flop: int
    rows: list[dict]
    notes: tuple[str, ...] = ()


Sides = Mapping[str, type]  # "agfsync", this package, comes first, then its peers
Measured = tuple[list[Task], dict[str, dict]]  # at least one; and what each side is about


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a file of this room exports.

    Attributes:
        unit: what its progress counts, in the plural.
        sides: name -> class (benches/_sides.py) that does the work. Each lives in a process of its
            own, so that memory and libraries do not mix.
        check: `(config)`; ValueError for settings that cannot be.
        measure: `(config, home, sides, clock)` -> the tasks, as these sides have done them; files
            are kept in the folder `home`.
        counts: keys of `config.bench` that are at least 1, as is `repeats`.
        one_device: the work is one device's, and the peers' are CPUs and GPUs.
        label: of the file that keeps the figures; the model's name where it is empty.
    """

    unit: str
    sides: Sides
    check: Callable[[Any], None]
    measure: Callable[..., Measured]
    counts: tuple[str, ...] = ()
    one_device: bool = True
    label: str = ""
