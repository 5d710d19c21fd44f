"""The runner of the loop's verbs: each is a `Step`, whose file is left with its work alone.

    main = Step("prompts", write_prompts, outputs=("prompts.jsonl",), settings=("seed", "prompts"))
    main(config, workdir, round_index=0, repair=False)

Of several processes all call a step. The runner waits for them wherever one reads what another one
writes: after repairing, after looking at what is there, after the work, and at the end.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agfsync_jax.parallel import multihost
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import read_json, to_path, write_text

INPUTS = "inputs.json"  # of a round: the digests of what each step reads there, when it began


@dataclasses.dataclass
class Job:
    """A step at work in a round of a workdir."""

    config: Any  #: the whole
    workdir: Path  #: a local folder, or one in a bucket
    round_index: int  #: from 0
    repair: bool = False  #: whether damaged files are made anew
    step: str = "last"  #: of a training that the step reads: last, best or a number
    requests: bool = False  #: whether what others are asked is only written
    plan: Any = None  #: what the step has made of its inputs and settings before it began
    files: Sequence[Path] = ()  #: what the processes share out among them, in order
    missing: set[Path] = dataclasses.field(default_factory=set)  #: of `files`, when the step began
    stage: Stage | None = None  #: the clock and progress
    #: What the step reads besides its inputs, as inputs.json remembers it; its plan says so. None:
    #: it is gone, and not needed.
    reads: Mapping[str, str] | None = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """round_NNN in the workdir."""
        return self.folder_of(self.round_index)

    def folder_of(self, index: int) -> Path:
        """The folder of another round."""
        return self.workdir / f"round_{index:03d}"


@dataclasses.dataclass(frozen=True)
class Step:
    """A verb of the loop."""

    name: str
    work: Callable[[Job], None]  #: makes what is missing
    outputs: tuple[str, ...]  #: what the step leaves in the round's folder
    #: What it reads there -> the verb that makes it; the step does not begin without.
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    optional_inputs: tuple[str, ...] = ()  #: what it reads there besides, if it is there
    settings: tuple[str, ...] = ()  #: blocks of the config that decide what the outputs are
    #: Reads and checks what the step needs, before anything is made; `Job.plan` keeps it.
    plan: Callable[[Job], Any] | None = None
    #: The files that the processes share out; the work is done when all are there.
    files: Callable[[Job], Sequence[Path]] | None = None
    #: Of the main process, when the work of all is done.
    finish: Callable[[Job], None] | None = None
    repair: Callable[[Job], None] | None = None  #: drops damaged files; each process its share
    main_only: bool = False  #: the main process works alone
    unit: str = "images"  #: what the progress counts, in the plural

    def __call__(
        self,
        config: Any,
        workdir: Path,
        *,
        round_index: int = 0,
        repair: bool = False,
        step: str = "last",
        requests: bool = False,
    ) -> None:
        """Runs the step in a round; what is there already is not made again.

        Raises FileNotFoundError where an input is not there, and what the parts of the step raise.
        """
        job = Job(config, to_path(workdir), round_index, repair, step, requests)
        for name, verb in self.inputs.items():
            if not (job.folder / name).exists():
                raise FileNotFoundError(f"{job.folder} has no {name}: run `agfsync {verb}` first.")
        mine = multihost.is_main() or not self.main_only
        if self.plan:
            job.plan = self.plan(job)
        if self.files:
            job.files = self.files(job)
        if self.repair:
            if repair and mine:
                self.repair(job)
            multihost.barrier(f"{self.name} repair")
        if self.files:
            job.missing = {path for path in job.files if not path.exists()}
            digests = self._digests(job)
            multihost.barrier(f"{self.name} plan")  # all have looked before one writes
            if multihost.is_main() and digests:
                write_text(job.folder / INPUTS, json.dumps(digests, indent=2) + "\n")
        with Stage(job.folder, self.name, unit=self.unit) as job.stage:
            if self.files:
                there = len(job.files) - len(job.missing)
                what = "files" if self.main_only else "shards"
                job.stage.skipped(there, len(job.files), what)
            if mine and (job.missing or not self.files):
                self.work(job)
            if self.finish:
                multihost.barrier(f"{self.name} work")
                if multihost.is_main():
                    self.finish(job)
            multihost.barrier(self.name)

    def _digests(self, job: Job) -> dict[str, dict[str, str]] | None:
        """What inputs.json must say, by step; None where it says so.

        Raises ValueError where an input is another one than what is there was made from.
        """
        path = job.folder / INPUTS
        known = read_json(path)
        inputs = [job.folder / name for name in (*self.inputs, *self.optional_inputs)]
        now = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in inputs
            if file.is_file()
        }
        before = known.get(self.name, now)
        if job.reads is None:
            reads = {name: before[name] for name in before.keys() - now.keys()}
        else:
            reads = dict(job.reads)
        now |= reads
        before = reads | before  # an earlier version did not remember them
        other = [name for name in now.keys() | before.keys() if now.get(name) != before.get(name)]
        if other and len(job.missing) < len(job.files):
            told = (
                f"{name} ({before[name]}, now {now[name]})"
                if name in reads and name in before
                else name
                for name in sorted(other)
            )
            raise ValueError(
                f"{job.folder}: {', '.join(told)} changed since {self.name} began. Put the former"
                f" back, or remove {', '.join(self.outputs)} to make all of it anew."
            )
        return known | {self.name: now} if (inputs or now) and known.get(self.name) != now else None


def of_process(files: Sequence) -> list:
    """Of what is shared out, this process's part."""
    return [files[index] for index in multihost.shards_of_process(len(files))]
