"""What `agfsync bench --stage=NAME` measures: a stage a file.

A file has `UNIT`, what its progress counts; `PEERS`, name -> class that does the same work
(benches/_peers.py), and `LIBRARIES`, which that needs; `check(config, against, platform)`, which
raises ValueError for settings that cannot be; and `measure(config, home, against, clock) ->
Measured`, which keeps its files in the folder `home`. Each side lives in a process of its own, so
that memory and libraries do not mix.
"""

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


def joined(about: dict[str, dict]) -> dict[str, Any]:
    """Our device, and what all sides are made of."""
    versions = {name: v for each in about.values() for name, v in each["versions"].items()}
    return {"device": about["agfsync"]["device"], "versions": versions}
