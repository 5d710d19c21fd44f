"""Near duplicates: embeddings of texts that are compared a second, all with all.

They are random, `config.bench.num_texts` of `config.bench.text_width`, about as alike as captions
of one tenth as many scenes. The reference is the definition, row by row in float64 numpy; beside it
there are at most 5,000 rows. The kept rows must be the same.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.benches import Bench, Measured, Sides, Task
from agfsync_jax.benches._processes import HostMemory, processor_name
from agfsync_jax.benches._sides import Side
from agfsync_jax.benches._turns import Ours, in_turns
from agfsync_jax.texts.duplicates import near_duplicates
from agfsync_jax.utils.clock import Stage

THRESHOLD = 0.9
REFERENCE_TEXTS = 5_000


def check(config: Any) -> None:
    """All settings are counts."""


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Each side compares the same rows, others in every turn."""
    spec = config.bench
    count = min(spec.num_texts, REFERENCE_TEXTS) if len(sides) > 1 else spec.num_texts
    task = Task("", "texts", count, 0, [])
    dropped: dict[str, list[np.ndarray]] = {side: [] for side in sides}

    def start(side, ask):
        return [ask("compare", count, spec.text_width, 0)["seconds"]]

    def turn(side, ask, task, number):
        row = ask("compare", count, spec.text_width, number)
        dropped[side].append(row.pop("nearest") >= 0)
        return row

    about = in_turns(sides, [task], clock, turns=spec.repeats, items=count, start=start, turn=turn)
    ours, *theirs = dropped.values()
    seconds = ", ".join(f"{row['seconds']:.4g}" for row in task.rows if row["by"] == "agfsync")
    notes = [f"agfsync took {seconds} s; {np.mean(ours):.0%} of the texts were dropped"]
    for other in theirs:
        same = sum(map(np.array_equal, ours, other))
        notes.append(f"the kept texts are the same in {same} of {len(ours)} turns")
    return [task._replace(notes=tuple(notes))], about


def clustered(count: int, width: int, seed: int) -> np.ndarray:
    """Rows of length one, ten or so around a center; their cosines with it are 0.7 to 1."""
    rng = np.random.default_rng(seed)

    def random_unit(rows):
        made = rng.standard_normal((rows, width), np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    groups = max(count // 10, 1)
    centers = random_unit(groups)
    cosine = rng.uniform(0.7, 1, (count, 1)).astype(np.float32)
    rows = random_unit(count) * np.sqrt(1 - cosine**2)
    rows += cosine * centers[rng.integers(0, groups, count)]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Comparing(Side):
    """Has `_nearest(rows)`: of each the kept row that it is a near duplicate of, or -1."""

    def compare(self, count: int, width: int, seed: int) -> dict[str, Any]:
        """Seconds, peak memory beside the embeddings, and what was found."""
        rows = clustered(count, width, seed)
        self.memory = HostMemory()
        seconds, nearest = self.timed(self._nearest, rows)
        return {"seconds": seconds, "peak_bytes": self.peak_bytes(), "nearest": nearest}


class Agfsync(Ours, Comparing):
    """This package."""

    _nearest = staticmethod(functools.partial(near_duplicates, threshold=THRESHOLD))


class Reference(Comparing):
    """The definition, row by row."""

    libraries = ("numpy",)

    def device_name(self) -> str:
        return processor_name()

    def peak_bytes(self) -> int:
        return self.memory.peak()

    def _nearest(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(np.float64)
        kept, table, nearest = [], np.empty_like(rows), np.full(len(rows), -1)
        for i, row in enumerate(rows):
            cosines = table[: len(kept)] @ row
            if len(kept) and cosines.max() >= THRESHOLD:
                nearest[i] = kept[int(cosines.argmax())]
            else:
                table[len(kept)] = row
                kept.append(i)
        return nearest


BENCH = Bench(
    unit="texts",
    sides={"agfsync": Agfsync, "reference": Reference},
    check=check,
    measure=measure,
    counts=("num_texts", "text_width"),
    label="texts",
)
