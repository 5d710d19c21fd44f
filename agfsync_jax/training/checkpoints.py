"""Checkpoints of a pytree of arrays, by Orbax: asynchronous, atomic, readable by any sharding.

A state is stored as one flat table from its path ("params.mid_block.resnets.0.conv1.kernel") to
the array, so that what made the tree (nnx, optax) may change and a part of it can be read alone.
"""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from agfsync_jax.utils.files import absolute, is_url, to_path
from agfsync_jax.utils.signals import unhurried

PyTree = Any
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one folder, the newest `keep` of them and the best one.

        with Checkpoints(round_dir / "checkpoints") as checkpoints:
            checkpoints.save(step, state)

    Saving copies the state off the devices and returns while it is written; leaving the `with`
    block waits for the last one. A folder of a step appears only when it is whole. What goes wrong
    while writing is raised by the next call: OSError where no space is left.

    Args:
        folder: it is made.
        keep: how many of the newest.
        best: the name of a metric; the checkpoint that was saved with its highest value stays too.
    """

    def __init__(self, folder: Path, keep: int = 2, best: str = ""):
        self.folder = absolute(to_path(folder))
        self._needed = 0  # bytes of what was saved last
        policies = [managers.LatestN(keep)]
        if best:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            create=True,
            cleanup_tmp_directories=True,
        )
        # The handler is named so that a manager which has saved nothing can read, too.
        self._manager = ocp.CheckpointManager(
            self.folder, item_handlers=ocp.PyTreeCheckpointHandler(), options=options
        )

    def __exit__(self, *_) -> None:
        with self._writing():
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that is whole; None in an empty folder."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: PyTree, wait: bool = False, metrics: dict[str, float] | None = None
    ) -> None:
        """Stores `state` (arrays and numbers) as `step`; an existing step is left as it is.

        `metrics` are what `best` looks at; without them a checkpoint is never the best.
        """
        if step not in self._manager.all_steps():
            leaves = _flatten(state)
            self._needed = sum(leaf.nbytes for leaf in leaves.values() if hasattr(leaf, "nbytes"))
            with self._writing():
                args = ocp.args.PyTreeSave(leaves)
                self._manager.save(step, args=args, metrics=metrics or None)
            if wait:
                self.wait()

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Reads the leaves of `abstract_state` at `step`, each into its sharding.

        Args:
            abstract_state: arrays or jax.ShapeDtypeStruct; a part of what was saved is enough.
                A leaf without a sharding is put on the first device.

        Raises:
            FileNotFoundError: there is no such step.
            ValueError: leaves are missing in the checkpoint or have another shape; lists all.
        """
        steps = self._manager.all_steps()
        if step not in steps:
            steps = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder} (has: {steps})")
        abstract = {name: _placed(leaf) for name, leaf in _flatten(abstract_state).items()}
        self._check(step, abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,
            ),
        )
        structure = jax.tree.structure(abstract_state)
        return jax.tree.unflatten(structure, [restored[name] for name in abstract])

    def leaves(self, step: int) -> set[str]:
        """The names of what is stored at a step."""
        return set(self._manager.item_metadata(step))

    def wait(self) -> None:
        """Returns when everything saved so far lies on the disk."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Is not cut off by a signal; "no space left", however Orbax tells it, is one line."""
        try:
            with unhurried():
                yield
        except Exception as error:
            if not _is_full(error):
                raise
            free = ""
            if not is_url(self.folder):
                free = f", {shutil.disk_usage(self.folder).free / 1e6:.1f} MB are free"
            raise OSError(
                errno.ENOSPC,
                f"No space left to write a checkpoint to {self.folder}:"
                f" {self._needed / 1e6:.1f} MB are needed{free}. The checkpoints before it are"
                " kept: make room, and the same command goes on from the last of them",
            ) from error

    def _check(self, step: int, abstract: dict[str, Any]) -> None:
        found = self._manager.item_metadata(step)
        wrong = [f"{name}: missing" for name in abstract if name not in found]
        for name in (name for name in abstract if name in found):
            has, wants = (tuple(getattr(x[name], "shape", ())) for x in (found, abstract))
            if has != wants:
                wrong.append(f"{name}: {has}, expected {wants}")
        if wrong:
            folder = self.folder / str(step)
            raise ValueError(f"the checkpoint {folder} does not fit the model: {'; '.join(wrong)}")


def restore_denoiser(folder: Path, abstract_params: PyTree, num_steps: int) -> PyTree:
    """The denoiser's parameters at the end of a training, from the checkpoints in `folder`."""
    return restore_end(folder, {"params": abstract_params}, num_steps)["params"]


def restore_end(folder: Path, abstract: dict[str, PyTree], num_steps: int) -> dict[str, PyTree]:
    """What a training left at its end, from the checkpoints in `folder`.

    Args:
        abstract: arrays, or their shapes and shardings: {"params": the denoiser's}, and
            {"adapters": ...} where LoRA was trained.
        num_steps: the steps of the training, `config.train.num_steps`.

    Raises:
        FileNotFoundError: `folder` holds no checkpoint.
        ValueError: the training is not over, as half-trained images would stay when it is; or the
            checkpoint is of another model: lists every parameter that does not fit.
    """
    if not to_path(folder).is_dir():
        raise FileNotFoundError(f"no checkpoints in {folder}; run `agfsync train` first")
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoints in {folder}; run `agfsync train` first")
        if step < num_steps:
            raise ValueError(
                f"{folder} ends at step {step} of config.train.num_steps={num_steps}:"
                " run `agfsync train` to the end first"
            )
        return checkpoints.restore(step, abstract)


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is that of a full disk; TensorStore's have no errno."""
    if error is None:
        return False
    if getattr(error, "errno", None) in _FULL:
        return True
    if any(f"os_error_code='{code}'" in str(error) for code in _FULL):
        return True
    behind = (error.__cause__, error.__context__, *getattr(error, "exceptions", ()))
    return any(map(_is_full, behind))


def _flatten(tree: PyTree) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _placed(leaf: Any) -> Any:
    """An abstract leaf that says where it goes."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
    return leaf
