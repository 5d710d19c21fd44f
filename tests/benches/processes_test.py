"""An object in another process answers, keeps its state, and says how it failed."""

import mmap
import os

import pytest

from agfsync_jax.benches._processes import HostMemory, Process


class Counter:
    def __init__(self):
        self.total = 0

    def add(self, number):
        self.total += number
        return self.total, os.getpid()

    def fail(self):
        raise KeyError("no such number")

    def die(self):
        os._exit(3)


def test_answers_and_errors():
    with Process(Counter, "the counter") as process:
        assert process.ask("add", 2)[0] == 2
        with pytest.raises(ValueError, match="the counter failed in `fail`: KeyError: 'no such"):
            process.ask("fail")
        total, pid = process.ask("add", 3)
        assert total == 5 and pid != os.getpid()
        with pytest.raises(ValueError, match="the counter died in `die` with exit code 3"):
            process.ask("die")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_interrupted_process_is_ended():
    with pytest.raises(KeyboardInterrupt), Process(Counter, "the counter") as process:
        pid = process.ask("add", 1)[1]
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_peak_memory_counts_what_was_freed_too():
    before = HostMemory()
    with mmap.mmap(-1, 2**26) as held:  # pages of its own: a heap may have some to spare
        for start in range(0, 2**26, 4096):
            held[start] = 1
    assert 2**26 * 0.9 < before.peak() < 2**27
    assert HostMemory().peak() < 2**24  # the mark starts anew
