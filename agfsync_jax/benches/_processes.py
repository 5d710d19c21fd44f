"""Objects that live in processes of their own, and what is known of a process and its host."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any


class Process:
    """An object of a class, made in a fresh process without arguments at the first question, and
    asked there for one method after the other; errors call it `name`.

        with Process(Measured, "agfsync") as process:
            answer = process.ask("method", argument)
    """

    def __init__(self, make: type, name: str):
        context = multiprocessing.get_context("spawn")
        self._name, (self._here, self._there) = name, context.Pipe()
        self._process = context.Process(target=_serve, args=(make, self._there))

    def __enter__(self) -> "Process":
        self._process.start()
        self._there.close()  # so that the end of that process is the end of the pipe
        return self

    def __exit__(self, kind, *_) -> None:
        self._here.close()
        if kind is None:
            self._process.join(timeout=5)  # to clean up; there is nothing to wait for
        self._process.kill()
        self._process.join()

    def ask(self, method: str, *args: Any) -> Any:
        """What the method answers; ValueError where it raises, or the process dies."""
        try:
            self._here.send((method, args))
            answer, error = self._here.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise ValueError(
                f"{self._name} died in `{method}` with exit code {self._process.exitcode}, perhaps "
                "for want of memory"
            ) from None
        if error:
            raise ValueError(f"{self._name} failed in `{method}`: {error}")
        return answer


def _serve(make: type, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    made = None
    while True:
        try:
            method, args = connection.recv()
        except EOFError:
            return
        try:
            made = made or make()
            connection.send((getattr(made, method)(*args), ""))
        except Exception as error:
            connection.send((None, f"{type(error).__name__}: {error}"))


class HostMemory:
    """Peak of this process's resident memory from here on, in bytes above what it has now."""

    def __init__(self):
        self._before = self._read("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark starts anew

    def peak(self) -> int:
        return self._read("VmHWM") - self._before

    def now(self) -> int:
        """What it has now, in bytes above what it had."""
        return self._read("VmRSS") - self._before

    def _read(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def processor_name() -> str:
    """The CPU's name and number of threads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} threads"
