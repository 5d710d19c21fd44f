"""What a workdir remembers: config.json, the config that made it.

Settings are of two kinds. Those of identity decide what comes out: where they change, what was made
with them is stale, and the old folder is refused. Run-time settings decide how and where the work
is done: they are free to change.
"""

import contextlib
import datetime
import fnmatch
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
from ml_collections import ConfigDict

from agfsync_jax.steps.runner import Step
from agfsync_jax.utils import files
from agfsync_jax.utils.configs import defaults, flatten, public

RUN_TIME = (
    *("rounds", "mesh.*", "sharding", "report.*", "export.*", "bench.*"),
    *("*.device_batch_size", "score.mesh.*", "score.max_bad", "pair.max_bad"),
    *("*.base_url", "*.api_key_env", "*.concurrency", "*.timeout", "*.max_requests"),
    *("*.price_in", "*.price_out", "train.remat", "train.keep"),
    *("train.tensorboard", "train.wandb"),
)


_ALIVE_SECONDS = 20.0  # between two signs of life in a bucket
_DEAD_SECONDS = 60.0  # without one, the holder is gone
_COSINE = (
    "\nMore steps go on with a training whose config.train.schedule is constant; a cosine that ends"
    " later has another learning rate in every step."
)
_LOGS = ("metrics.jsonl", "tensorboard", "wandb")  # beside checkpoints
EXTENDS = "train.num_steps"  # larger, it goes on with a training that has ended


def is_run_time(key: str) -> bool:
    """Whether a key of the config, such as "mesh.data", is free to change."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in RUN_TIME)


def claim(
    workdir: Path, config: ConfigDict, steps: Callable[[], Sequence[Step]], write: bool = True
) -> None:
    """Compares the config with the one that made the workdir, then writes it to config.json.

    A setting of identity may change as long as nothing that was made with it is there.

    Args:
        workdir: it is made.
        config: the whole of it; secrets are neither compared nor written.
        steps: gives those of the loop, in order; called where settings differ.
        write: false on all but the main process.

    Raises:
        ValueError: settings differ; lists them, and what would have to go.
        NotADirectoryError: `workdir` is a file.
        OSError: the URL `workdir` cannot be reached.
    """
    workdir = files.to_path(workdir)
    files.check_reachable(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"--workdir={workdir} is a file; expected a folder")
    path = workdir / "config.json"
    text = json.dumps(public(config.to_dict()), indent=2)
    now = flatten(json.loads(text))  # tuples are lists in JSON
    before = flatten(files.read_json(path)) or now
    if before is not now:  # an earlier version did what a key that it lacks has as its default
        before = {key: value for key, value in defaults().items() if key in now} | before
    differ, stale, hint = [], set(), ""
    for key in sorted(before.keys() | now.keys()):
        was, new = before.get(key), now.get(key)
        if was == new or is_run_time(key):
            continue
        if key == EXTENDS and _goes_on(before, now):
            made = _made_of_trained(workdir, steps())
        else:
            made = _made_with(workdir, key, steps())
            hint = _COSINE if key == EXTENDS and new > (was or 0) else hint
        if made:
            stale |= set(made)
            differ.append(f"  {key}: {json.dumps(was)} there, {json.dumps(new)} now")
    if differ:
        outputs = [output for step in steps() for output in step.outputs if output in stale]
        outputs += sorted(stale - set(outputs))
        raise ValueError(
            f"{workdir} was made by another config:\n"
            + "\n".join(differ)
            + "\nTake another --workdir, set these keys back, or remove from its rounds:"
            f" {', '.join(outputs)}{hint}"
        )
    if write:
        files.write_text(path, text + "\n")


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a workdir.

    The lock of a local one is the kernel's, and goes with the process that holds it, however that
    ends. A bucket knows no locks: there the holder says all the time that it lives.

    Raises:
        ValueError: another process holds it; says which, and since when.
        OSError: the URL `workdir` cannot be reached.
    """
    workdir = files.to_path(workdir)
    files.check_reachable(workdir)
    holder = workdir / ".running.json"
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    who = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
    hold = _held_in_bucket if files.is_url(workdir) else _held_here
    try:
        with hold(holder, who):
            yield
    except filelock.Timeout:
        who = files.read_json(holder)
        who.pop("alive", None)
        told = ", ".join(f"{key} {value}" for key, value in who.items()) or "just started"
        raise ValueError(
            f"{workdir} is in use by another run ({told}): wait for it, stop it, or take another"
            " --workdir."
        ) from None


@contextlib.contextmanager
def _held_here(holder: Path, who: dict[str, Any]) -> Iterator[None]:
    files.make_folder(holder.parent)
    with filelock.FileLock(holder.with_suffix(".lock"), timeout=0):
        files.write_text(holder, json.dumps(who))
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)


def _lives(holder: Path) -> bool:
    """Whether the holder gives another sign of life; one that was killed could not say so."""

    def last() -> float:
        return files.read_json(holder).get("alive", 0.0)

    seen = last()
    if time.time() < seen + _DEAD_SECONDS:
        print(f"{holder.parent}: is the run that was here still alive? ...", file=sys.stderr)
    while time.time() < seen + _DEAD_SECONDS:
        time.sleep(_ALIVE_SECONDS / 10)
        if (now := last()) != seen:
            return bool(now)  # or it has ended by now
    return False


@contextlib.contextmanager
def _held_in_bucket(holder: Path, who: dict[str, Any]) -> Iterator[None]:
    if holder.exists() and _lives(holder):
        raise filelock.Timeout(str(holder))
    stopped = threading.Event()

    def live() -> None:
        while True:
            with contextlib.suppress(Exception):  # a bucket that is away for a while
                files.write_text(holder, json.dumps(who | {"alive": time.time()}))
            if stopped.wait(_ALIVE_SECONDS):
                return

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        holder.unlink(missing_ok=True)


def _goes_on(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the longer training is the shorter one and more steps: its learning rate is another
    from the first step where a cosine ends later."""
    longer = now[EXTENDS] > before.get(EXTENDS, math.inf)
    return longer and before.get("train.schedule") == "constant"


def _made_of_trained(workdir: Path, steps: Sequence[Step]) -> list[str]:
    """What is there that was made from the end of a training: evaluations, and later rounds."""
    first = next(i for i, step in enumerate(steps) if "train" in step.settings)
    outputs = [output for step in steps[first + 1 :] for output in step.outputs]
    made = [each for each in outputs if any(map(_is_something, workdir.glob(f"round_*/{each}")))]
    later = (path for path in workdir.glob("round_[0-9]*") if path.name != "round_000")
    return made + [path.name for path in later if _is_something(path)]


def _made_with(workdir: Path, key: str, steps: Sequence[Step]) -> list[str]:
    """What is there of the first step that a key decides about, and of those that follow it."""
    block = key.partition(".")[0]
    first = next((i for i, step in enumerate(steps) if block in step.settings), 0)
    outputs = (output for step in steps[first:] for output in step.outputs)
    return [
        output for output in outputs if any(map(_is_something, workdir.glob(f"round_*/{output}")))
    ]


def _is_something(path: Path) -> bool:
    """A file, or a folder that holds one: what stopped before it made anything leaves it empty, or,
    a training, with logs alone."""
    return any(each.name not in _LOGS for each in path.iterdir()) if path.is_dir() else True
