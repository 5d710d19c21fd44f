"""What a stage costs: progress and rate while it runs, seconds and items when it is done."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import jax
from tqdm import tqdm

from agfsync_jax.utils.files import read_json, to_path, write_text

PLAIN_LINE_SECONDS = 10.0  # between two lines where there is no terminal
COMPILING_LINE_SECONDS = 15.0  # until the first items are there
ESTIMATE_AFTER_SECONDS = 3.0  # of steady work; the first step compiles and says nothing
ESTIMATE_ABOVE_SECONDS = 60.0


class Stage:
    """One verb's clock.

        with Stage(round_dir, "sample") as stage:
            stage.skipped(2, 8)
            with stage.progress(num_images) as progress:
                for shard in shards:
                    ...
                    progress.update(len(shard))

    Seconds and items add up over restarts in round_dir/stages.json, also when the stage is
    stopped halfway: {verb: {"seconds", "items", "items_per_second"}}. Only the main process
    prints and writes.

    Args:
        round_dir: the folder of the round; it is made.
        verb: the key in stages.json and the head of every line.
        unit: what an item is, in the plural.
    """

    def __init__(self, round_dir: Path, verb: str, unit: str = "images"):
        self.path = to_path(round_dir) / "stages.json"
        self.verb, self.unit, self.items = verb, unit, 0
        self._seconds = 0.0
        self._since: float | None = None  # None while the clock stands still
        self._before = {"seconds": 0.0, "items": 0}
        self._main = jax.process_index() == 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Stage":
        self._before = read_stages(self.path).get(self.verb, self._before)
        self._since = time.monotonic()
        return self

    def __exit__(self, kind, *_) -> None:
        self._stop()
        # A run that found everything done leaves the figures of the run that did it.
        # After an error, a full disk for one, that one is told, and none that follows from it.
        with suppress(OSError) if kind else nullcontext():
            if self.items or self.verb not in read_stages(self.path):
                self._write()
        if kind is None and self.items:
            rate = self.items / max(self._seconds, 1e-9)
            self.print(f"{self.items} {self.unit} in {duration(self._seconds)} ({rate:.4g}/s)")

    @property
    def seconds(self) -> float:
        """Seconds of this run, without pauses."""
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._seconds + running

    def print(self, message: str) -> None:
        """One line on stderr, headed by the verb, from the main process only."""
        if self._main:
            tqdm.write(f"{self.verb}: {message}", file=sys.stderr)
            sys.stderr.flush()

    def skipped(self, done: int, total: int, what: str = "shards") -> None:
        """Says how much an earlier run has left; nothing when that is nothing."""
        if done:
            self.print(f"skipped {done} of {total} {what} already there")

    def progress(self, work: int | Iterable, desc: str = "", unit: str = "") -> "Progress":
        """A bar over `work`: a number of items, or an iterable of which each element is one; of
        another unit they are not the stage's items."""
        return Progress(self, work, desc, unit)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The clock stands still inside: for saves and evaluations."""
        self._stop()
        try:
            yield
        finally:
            self._since = time.monotonic()

    def _stop(self) -> None:
        self._seconds, self._since = self.seconds, None

    def _write(self) -> None:
        seconds = self._before["seconds"] + self.seconds
        items = self._before["items"] + self.items
        rate = round(items / max(seconds, 1e-9), 4)
        figures = {"seconds": round(seconds, 3), "items": items, "items_per_second": rate}
        if self._main:
            stages = read_stages(self.path) | {self.verb: figures}
            write_text(self.path, json.dumps(stages, indent=2) + "\n")


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere. Made by Stage.progress."""

    def __init__(self, stage: Stage, work: int | Iterable, desc: str, unit: str = ""):
        self._stage, self._counts = stage, not unit
        self._unit = unit or stage.unit
        self._work = range(work) if isinstance(work, int) else work
        self._total = len(self._work) if isinstance(self._work, Sized) else 0
        self._done = 0
        self._desc = f"{desc} " if desc else ""
        self._steady: tuple[float, int] | None = None  # stage seconds, items: after the first step
        self._estimated = False
        self._lined = time.monotonic()
        self._begun = threading.Event()  # the first items are there, or none will come
        self._bar = tqdm(
            total=self._total or None,
            desc=f"{stage.verb} {desc}".rstrip(),
            unit=f" {self._unit}",
            disable=not (stage._main and stage._terminal),
            dynamic_ncols=True,
            leave=False,
        )

    def __enter__(self) -> "Progress":
        if self._stage._main:
            threading.Thread(target=self._tell_of_the_first, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._begun.set()
        self._bar.close()

    def _tell_of_the_first(self) -> None:
        """Until the first items are there, says that nothing hangs."""
        began = time.monotonic()
        while not self._begun.wait(COMPILING_LINE_SECONDS):
            waited = duration(time.monotonic() - began)
            what = "compiling, and running the first batch" if self._counts else "waiting"
            self._stage.print(f"{what}: {waited} so far")

    def __iter__(self) -> Iterator:
        with self:
            for item in self._work:
                yield item
                self.update()

    def update(self, n: int = 1, note: str = "") -> None:
        """Counts `n` more items; `note` is shown beside the rate."""
        stage, now = self._stage, time.monotonic()
        self._begun.set()
        self._done += n
        stage.items += n if self._counts else 0
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(n)
        if self._steady is None:
            self._steady = stage.seconds, self._done
            return
        # From the second step on: the first one compiled.
        seconds = stage.seconds - self._steady[0]
        rate = (self._done - self._steady[1]) / max(seconds, 1e-9)
        if not rate:
            return
        left = max(self._total - self._done, 0) / rate
        if not self._estimated and seconds >= ESTIMATE_AFTER_SECONDS:
            self._estimated = True
            if self._total and stage.seconds + left >= ESTIMATE_ABOVE_SECONDS:
                whole = duration(stage.seconds + left)
                stage.print(f"about {whole} for {self._total} {self._unit}")
        if now - self._lined >= PLAIN_LINE_SECONDS:
            self._lined = now
            stage._write()  # a killed run loses ten seconds of its figures at most
            if not stage._terminal:
                of = f"/{self._total}" if self._total else ""
                to_go = f"{duration(left)} left" if self._total else ""
                said = f"{self._desc}{self._done}{of} {self._unit}", f"{rate:.4g}/s", to_go, note
                stage.print(", ".join(filter(None, said)))

    def leave_out(self, seconds: float) -> None:
        """The last seconds were of something that is done once, and tell nothing of the rate."""
        if self._steady:
            self._steady = self._steady[0] + seconds, self._steady[1]


def read_stages(path: Path) -> dict[str, dict[str, float]]:
    """The contents of a stages.json; {} when there is none."""
    return read_json(to_path(path))


def duration(seconds: float) -> str:
    """Seconds as a person would say them: "2.5 s", "40 s", "12 min", "3 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
