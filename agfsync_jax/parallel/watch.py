"""Processes that watch over one another: when one stops or is gone, the others stop and say so.

Without it they would wait in a collective for ever, or be aborted by JAX with a stack trace.
Every process counts up in the store of JAX's coordination service, and looks at the others' counts.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # without a count
GONE = 75  # the exit status (EX_TEMPFAIL) of a process whose companion is gone
_STORE = "agfsync/alive"
_GO_ON = "What is done is kept: the same command on all processes goes on from there."
# Runs beside a process, and speaks when that ends without a farewell: JAX aborts a process whose
# coordinator is gone, and nothing of Python's runs then.
_LAST_WORDS = """
import sys
words = sys.stdin.read().splitlines()
if words[-1] != "farewell":
    print("agfsync: error:", words[-1], file=sys.stderr, flush=True)
"""

_watch: "Watch | None" = None
_speaker: subprocess.Popen | None = None


def leave_last_words(text: str) -> None:
    """What is told on stderr if this process is killed or aborted; replaces what was left."""
    global _speaker
    if _speaker is None:
        command = [sys.executable, "-S", "-E", "-c", _LAST_WORDS]
        _speaker = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(_farewell)
    _speaker.stdin.write(text + "\n")
    _speaker.stdin.flush()


def _farewell() -> None:
    global _speaker
    if _speaker is not None:
        _speaker.communicate("farewell\n")
        _speaker = None


def start(store: Any, names: list[str]) -> None:
    """Starts to watch; `names` are those of all processes, in order."""
    global _watch
    me = jax.process_index()
    _watch = Watch(store, names, me)
    _watch.start()
    why = f", or stopped because {names[0]}, through which all talk, is gone" if me else ""
    leave_last_words(f"{names[me]} was killed{why}. {_GO_ON}")


class Watch(threading.Thread):
    """Counts, and ends this process when another one has stopped or does not count any more."""

    def __init__(self, store: Any, names: list[str], me: int):
        super().__init__(daemon=True, name="watch")
        self._store, self._names, self.me = store, names, me
        self._over = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        count = 0
        while not self._over.wait(BEAT_SECONDS if count else 0):
            self.tell(str(count))
            if problem := self.problem():
                self.tell("left")
                print(f"agfsync: error: {problem} {_GO_ON}", file=sys.stderr)
                _leave(GONE)
            count += 1

    def tell(self, text: str) -> None:
        self._store.key_value_set(f"{_STORE}/{self.me}", text, allow_overwrite=True)

    def problem(self) -> str:
        """What is wrong with another process; empty if nothing is."""
        now = time.monotonic()
        for key, value in self._store.key_value_dir_get(f"{_STORE}/"):
            index = int(key.rpartition("/")[2])
            if value.startswith("stopped: "):
                return f"{self._names[index]} {value.removeprefix('stopped: ')}"
            if index not in self._seen or self._seen[index][0] != value:
                self._seen[index] = value, now
            elif value.isdecimal() and now - self._seen[index][1] > LOST_SECONDS:
                return (
                    f"{self._names[index]} is gone: nothing was heard of it for"
                    f" {LOST_SECONDS:.0f} s. It was killed, or its host is lost."
                )
        return ""

    def end(self, text: str) -> None:
        """The last word."""
        self._over.set()
        self.join(timeout=5)  # else its last count could come after
        self.tell(text)


def stop(why: str, status: int) -> None:
    """Ends this process, and the others, which are told why; returns where it is the only one."""
    if _watch:
        _watch.end(f"stopped: {why}")
        if _watch.me == 0:
            time.sleep(2 * BEAT_SECONDS)  # the store goes with it, and the others have to look
        _leave(status)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around the work: the others go on when it is done, and stop when it fails.

    A computation fails where another process is gone, too: there is time to find that out first.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError):
        raise  # the command line tells them
    except Exception as error:
        if not _watch:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            print("a computation failed; is another process gone?", file=sys.stderr, flush=True)
            time.sleep(LOST_SECONDS + 2 * BEAT_SECONDS)
        traceback.print_exc()
        stop(f"failed with {type(error).__name__}: its log says more.", 1)
    if _watch:
        _watch.end("done")


def _leave(status: int) -> None:
    """Ends the process at once: in order it would wait for those that are gone."""
    _farewell()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
