"""Sweep: the runs that a config's `sweep()` yields, one after another, then side by side.

    def sweep():
        for beta in (1000.0, 2000.0):
            yield {"loss.beta": beta}  # keys and values of the config

    agfsync sweep --config=FILE --workdir=DIR

Each run has a workdir of its own, DIR/loss.beta=1000.0 and so on. Prompts, questions, candidates
and scores are made once for all runs that agree on what those depend on: they lie in DIR/shared
(DIR/shared-2, ... where runs differ in it), and the runs begin with their pairs (config.pair.path).
The base model's images of the evaluation are copied from the first run that is finished.
Runs that bring pairs, or have more than one round, share nothing: later rounds draw their own.

All runs are checked before the first one starts. The same command goes on where it was stopped, and
a run that is finished is skipped. One whose training diverges does not keep the others from theirs.
At the end `agfsync compare` puts all runs side by side, in DIR/compare.html.

--dry-run prints the commands that do the same, one a line: those of what is shared, then one a run.
--index=shared makes what is shared and --index=N the run of that number alone, as tasks of a
cluster's queue do that start together; the same command without it then compares.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from agfsync_jax import checks, compare, run
from agfsync_jax.data import records
from agfsync_jax.data.scores import check_scored
from agfsync_jax.parallel import multihost
from agfsync_jax.steps import settings
from agfsync_jax.utils import configs
from agfsync_jax.utils.files import Unreachable, absolute, to_path

# What candidates and their scores depend on.
BLOCKS = {block for verb in run.SCORED for block in verb.main.settings}
STEPS = [verb.main for verb in run.ROUND]


class Part(NamedTuple):
    """A run of the sweep, or what several of them share."""

    workdir: Path
    overrides: Mapping[str, str]  # all that its command line has
    config: ConfigDict
    shared: "Part | None" = None  # what a run begins with; None where it draws its own

    @property
    def is_finished(self) -> bool:
        """Whether a run has come to its end."""
        evals = self.workdir / f"round_{self.config.rounds - 1:03d}" / "evals"
        return (evals / "comparison.json").exists() and (self.workdir / "report.html").exists()


def main(
    config: ConfigDict,
    workdir: Path,
    *,
    round_index: int = 0,
    repair: bool = False,
    step: str = "last",
    dry_run: bool = False,
    index: str = "",
    spec: str,
    overrides: Mapping[str, str],
    runs: Sequence[Mapping[str, str]],
) -> None:
    """Runs what is not finished, or with `index` a part of it, and compares; or prints commands.

    Args:
        step: see run.py.
        index: "shared", or the number of a run; "" for all.
        spec, overrides: the command line's --config, and keys of it.
        runs: what sweep() yields.

    Raises:
        ValueError: what is wrong with a run, or with all of them.
        FloatingPointError: trainings that diverged, when all others are done.
    """
    del config, round_index  # of each run its own
    every = plan(spec, overrides, runs, to_path(workdir))
    if index not in ("", "shared", *map(str, range(len(every)))):
        raise ValueError(f"--index={index}: expected shared, or a number, 0 to {len(every) - 1}.")
    chosen = [every[int(index)]] if index.isdecimal() else every
    todo = [part for part in chosen if repair or step != "last" or not part.is_finished]
    check(chosen if dry_run else todo, num_devices=None if dry_run else jax.device_count())
    if dry_run:
        if multihost.is_main():
            mend = ["--repair"] * repair
            lines = [] if index.isdecimal() else of_shared(spec, shared_by(chosen), mend)
            mend += [f"--step={step}"] * (step != "last")
            runs = [] if index == "shared" else chosen
            lines += [command("run", spec, part.workdir, part.overrides, *mend) for part in runs]
            print("\n".join(lines))
        return
    for part in shared_by(todo):
        if index.isdecimal():
            check_there(part, command("sweep", spec, workdir, overrides, "--index=shared"))
            continue
        tell(f"what runs share, in {part.workdir}")
        with opened(part):
            run.go_through(run.SCORED, part.config, part.workdir, repair=repair)
    diverged = []
    for number, part in enumerate(chosen if index != "shared" else ()):
        tell(f"run {number + 1} of {len(chosen)}: {part.workdir}{' is done' * (part not in todo)}")
        if part not in todo:
            continue
        base = next((each for each in every if each.is_finished and same_base(each, part)), None)
        try:
            with opened(part):
                if base and multihost.is_main():
                    copy_base(base, part)
                multihost.barrier("sweep base")
                run.main(part.config, part.workdir, repair=repair, step=step)
        except FloatingPointError as error:
            diverged.append(f"{part.workdir}: {error}")
    done = [str(part.workdir) for part in chosen if part.is_finished]
    if multihost.is_main() and done and not index:
        compare.main(None, None, workdirs=done, output=str(workdir))
    if diverged:
        raise FloatingPointError("; ".join(diverged))


def plan(
    spec: str, overrides: Mapping[str, str], runs: Sequence[Mapping[str, str]], workdir: Path
) -> list[Part]:
    """The runs, in order, each with what it shares.

    Raises ValueError for overrides that no config takes, that the command line has too, or that
    make the same run as others.
    """
    parts, seen, shared = [], {}, {}
    for own in runs:
        if both := own.keys() & overrides.keys():
            raise ValueError(f"--config.{min(both)}: sweep() sets it, so leave it out here.")
        try:
            config = configs.load(spec, {**overrides, **own})
        except ValueError as error:
            raise ValueError(f"sweep() yields {own}: {error}") from None
        flat = configs.flatten(config)
        if (same := seen.setdefault(repr(sorted(flat.items())), own)) is not own:
            raise ValueError(f"sweep() yields the same run twice, by {same} and by {own}.")
        mine, common = {**overrides, **own}, None
        if not config.pair.path and config.rounds == 1:
            decides = [k for k in sorted(flat) if is_of_scores(k) and not settings.is_run_time(k)]
            drawn = {**overrides, **{k: v for k, v in own.items() if is_of_scores(k)}}
            place = workdir / (f"shared-{len(shared) + 1}" if shared else "shared")
            common = Part(place, drawn, configs.load(spec, drawn))
            common = shared.setdefault(repr([(k, flat[k]) for k in decides]), common)
            mine["pair.path"] = str(absolute(common.workdir / "round_000"))
        parts.append(Part(workdir / name_of(own), mine, configs.load(spec, mine), common))
    return parts


def is_of_scores(key: str) -> bool:
    """Whether candidates or scores depend on a key's block."""
    return key.partition(".")[0] in BLOCKS


def name_of(overrides: Mapping[str, str]) -> str:
    """A run's folder: its overrides, with a digest where a folder's name cannot say all of them."""
    text = ",".join(f"{key}={value}" for key, value in overrides.items()) or "unchanged"
    name = re.sub(r"[^\w.=,+-]+", "_", text, flags=re.ASCII)[:120]
    return name if name == text else f"{name}-{sha256(text.encode()).hexdigest()[:6]}"


def shared_by(parts: Sequence[Part]) -> list[Part]:
    """What runs share, in order."""
    return list({part.shared.workdir: part.shared for part in parts if part.shared}.values())


def check(parts: Sequence[Part], num_devices: int | None) -> None:
    """Raises ValueError for the first run that cannot be; num_devices is None elsewhere."""
    for part in parts:
        config = part.config.copy_and_resolve_references()
        config.pair.path = "" if part.shared else config.pair.path  # which need not be there yet
        try:
            checks.check(config, "run", num_devices=num_devices)
            for each, verb in ((part, "run"), (part.shared, "sample")) if num_devices else ():
                if each:
                    checks.refuse(checks.room(each.config, verb, each.workdir))
                    settings.claim(each.workdir, each.config, lambda: STEPS, write=False)
        except Unreachable:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"run {part.workdir.name}: {error}") from error


def same_base(one: Part, other: Part) -> bool:
    """Whether both runs judge the same images of the base model."""
    decides = BLOCKS | {"evaluate"}
    flat = [
        {
            key: value
            for key, value in configs.flatten(part.config).items()
            if key.partition(".")[0] in decides and not settings.is_run_time(key)
        }
        for part in (one, other)
    ]
    return flat[0] == flat[1]


def copy_base(done: Part, part: Part) -> None:
    """The images of the base model and their scores, which are drawn once for all runs that may
    have them; nothing where the run has begun its own."""
    source, target = (each.workdir / "round_000" / "evals" for each in (done, part))
    if target.exists():
        return
    tell(f"the base model's images are those of {done.workdir}")
    for path in (*source.glob("*.jsonl"), *source.glob("base/*")):
        records.write_file(target / path.relative_to(source), [path.read_bytes()])


def check_there(part: Part, command: str) -> None:
    """Raises ValueError with the command that makes it where what runs share is not whole."""
    try:
        check_scored(part.workdir / "round_000", part.config.pair.weights)
    except FileNotFoundError as error:
        raise ValueError(f"{error} All that runs share comes by: {command}") from None


def of_shared(spec: str, parts: Sequence[Part], mend: Sequence[str]) -> list[str]:
    """The commands that make what is shared."""
    names = [verb.__name__.rpartition(".")[2] for verb in run.SCORED]
    return [command(name, spec, p.workdir, p.overrides, *mend) for p in parts for name in names]


def command(
    verb: str, spec: str, workdir: str | Path, overrides: Mapping[str, str], *more: str
) -> str:
    """A command line, quoted for a shell."""
    keys = [f"--config.{key}={value}" for key, value in overrides.items()]
    return shlex.join(["agfsync", verb, f"--config={spec}", f"--workdir={workdir}", *keys, *more])


@contextlib.contextmanager
def opened(part: Part) -> Iterator[None]:
    """Holds a workdir, which remembers its config, as the command line does for a single verb."""
    is_main = multihost.is_main()
    with settings.held(part.workdir) if is_main else contextlib.nullcontext():
        settings.claim(part.workdir, part.config, lambda: STEPS, write=is_main)
        yield


def tell(line: str) -> None:
    """Says so once, of all processes."""
    if multihost.is_main():
        print(f"sweep: {line}", file=sys.stderr, flush=True)
