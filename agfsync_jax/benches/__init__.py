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


class Measured(NamedTuple):
    """What a stage measured.

    Attributes:
        tasks: at least one.
        about: {"device", "versions"}.
        settings: what was measured, as it was in the end.
        label: of the file that keeps the figures.
    """

    tasks: list[Task]
    about: dict[str, Any]
    settings: dict[str, Any]
    label: str


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a file of this room exports.

    Attributes:
        unit: what its progress counts, in the plural.
        ours: the class that does the work with this package, and
        peers: name -> class that does the same with others (benches/_peers.py). Each side lives in
            a process of its own, so that memory and libraries do not mix.
        libraries: what the peers need.
        check: `(config, against, platform)`; ValueError for settings that cannot be.
        measure: `(config, home, against, clock)` -> what was measured, of us and the peer named
            `against`, if any; files are kept in the folder `home`.
    """

    unit: str
    ours: type
    peers: Mapping[str, type]
    libraries: tuple[str, ...]
    check: Callable[[Any, str | None, str], None]
    measure: Callable[..., Measured]

    def sides(self, against: str | None) -> dict[str, type]:
        """Who takes turns, and its class."""
        return {"agfsync": self.ours} | ({against: self.peers[against]} if against else {})


def joined(about: dict[str, dict]) -> dict[str, Any]:
    """Our device, and what all sides are made of."""
    versions = {name: v for each in about.values() for name, v in each["versions"].items()}
    return {"device": about["agfsync"]["device"], "versions": versions}
