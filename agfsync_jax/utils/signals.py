"""Stopping between two steps, and not in the middle of one; and in time, whatever is under way."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

ACT_SECONDS = 5.0  # in which a signal is acted on
STEP_SECONDS = 20.0  # in which what holds it back ends; AGFSYNC_STOP_SECONDS is another number
_holding, _unhurried = 0, 0  # how many blocks of either kind are open


@contextlib.contextmanager
def ended_in_time(end: Callable[[int], None]) -> Iterator[None]:
    """Inside, `end(number)` is called where nobody acts on SIGINT or SIGTERM in time; it ends the
    process.

    Python acts on a signal when the main thread is back from what it called, and a device may take
    minutes for a batch. This thread sees the signal at once. It gives `ACT_SECONDS`, or
    `STEP_SECONDS` where SIGTERM is held back, and waits for `unhurried` blocks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch():
        while not over.is_set():
            number = reader.recv(1)[0]
            if number in (signal.SIGINT, signal.SIGTERM) and _too_late(number, over):
                end(number)

    thread = threading.Thread(target=watch, daemon=True, name="signals")
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()


def _too_late(number: int, over: threading.Event) -> bool:
    """Waits until it is over, or time to end; whether it is that."""
    step_seconds = float(os.environ.get("AGFSYNC_STOP_SECONDS") or STEP_SECONDS)
    since, told = time.monotonic(), False
    while not over.wait(0.1):
        if _holding and number == signal.SIGINT:
            return False  # who cannot wait presses it once more
        if _holding and not told:
            told = True
            print(
                f"\nstopping: the step under way is saved if it ends within {step_seconds:g} s"
                " (AGFSYNC_STOP_SECONDS); else training goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        if _unhurried:
            since = time.monotonic()
        if time.monotonic() - since > (step_seconds if _holding else ACT_SECONDS):
            return True
    return False


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """Around what must not be cut off, such as a save: `ended_in_time` waits for it."""
    global _unhurried
    _unhurried += 1
    try:
        yield
    finally:
        _unhurried -= 1


@contextlib.contextmanager
def hold_signals(*numbers: int) -> Iterator[list[int]]:
    """Holds signals back until the block is left, so that it can end in order.

        with hold_signals(signal.SIGINT, signal.SIGTERM) as held:
            while work and not held:
                ...

    The first signal is added to the list, and raised anew after the block. A second one acts at
    once, for a person who cannot wait. Outside the main thread, which alone gets signals, nothing
    is held.
    """
    global _holding
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return

    def hold(number, _):
        held.append(number)
        release()

    def release():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, hold) for number in numbers}
    _holding += 1
    try:
        yield held
    finally:
        _holding -= 1
        release()
    if held:
        signal.raise_signal(held[0])
