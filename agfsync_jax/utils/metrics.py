"""Metrics on disk, one JSON object a line."""

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from agfsync_jax.utils.files import absolute, copy_tree, is_url, local_folder, to_path, write_text


class MetricWriter(contextlib.AbstractContextManager):
    """Appends {"step": n, name: number, ...} lines to a file.

    A restarted run passes the step it restored: lines past it, and a half-written last line,
    are dropped, so the file reads as if the run had never stopped. A local file has each line at
    once; one in a bucket, to which nothing can be appended, is written anew by `flush`.

    Args:
        path: the file; its folder is made.
        step: the last step that counts; 0 starts afresh.
        enabled: false on all but the main process, where nothing is written.
        tensorboard: a folder that TensorBoard reads, for the same numbers and for images.
        wandb: a Weights & Biases project, for the same; needs `pip install wandb` and a login.

    Raises:
        ValueError: a project, and no wandb.
    """

    def __init__(
        self,
        path: Path,
        step: int = 0,
        enabled: bool = True,
        *,
        tensorboard: Path | None = None,
        wandb: str = "",
    ):
        self.path = to_path(path)
        self._file = self._board = self._run = None
        self._folders = contextlib.ExitStack()
        if not enabled:
            return
        if wandb:
            self._run = _start_wandb(wandb, self.path.parent)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = to_path(tensorboard)
            self._local_events = self._folders.enter_context(local_folder(self._events))
            # What a killed run wrote beyond its checkpoint is taken back.
            self._board = SummaryWriter(str(self._local_events), purge_step=step + 1)
        kept = (row for row in read_metrics(self.path) if row["step"] <= step)
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.path, text)
        if is_url(self.path):
            self._file = io.StringIO(text)
            self._file.seek(0, io.SEEK_END)
        else:
            self._file = self.path.open("a")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds one line; `values` are numbers or arrays of one element."""
        if self._file is None:
            return
        row = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step)} | row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)
        if self._run:
            self._run.log(row, step=step)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Shows an image; metrics.jsonl has none."""
        if self._board:
            self._board.add_image(name, image, step, dataformats="HWC")
        if self._run:
            import wandb

            self._run.log({name: wandb.Image(image)}, step=step)

    def flush(self) -> None:
        """Lets a bucket have all that was written so far: before a checkpoint, and at the end."""
        if self._file is not None and is_url(self.path):
            write_text(self.path, self._file.getvalue())
        if self._board and is_url(self._events):
            self._board.flush()
            copy_tree(self._local_events, self._events)

    def __exit__(self, kind, *_) -> None:
        # After an error, a full disk for one, that one is told, and none that follows from it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            if self._board:
                self._board.close()  # only now all events lie in the file
            self.flush()
            self._folders.close()
            if self._file is not None:
                self._file.close()
        if self._run:
            self._run.finish()


def _start_wandb(project: str, folder: Path) -> Any:
    """The run of a folder, which goes on where it was."""
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.train.wandb={project!r} needs wandb: `pip install wandb`, then `wandb login`;"
            " or leave it empty."
        ) from error
    name = "-".join(absolute(folder).parts[-3:-1])
    identity = hashlib.sha256(str(absolute(folder)).encode()).hexdigest()[:16]
    own = None if is_url(folder) else str(folder)  # what it keeps on this machine: by default here
    return wandb.init(project=project, name=name, id=identity, resume="allow", dir=own)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, without a half-written last line; [] when there is no file."""
    path = to_path(path)
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
