"""Stopping between two steps, and not in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Iterator


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
    try:
        yield held
    finally:
        release()
    if held:
        signal.raise_signal(held[0])
