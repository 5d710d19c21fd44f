"""Checkpoints of a pytree of arrays, by Orbax: asynchronous, atomic, readable by any sharding.

A state is stored as one flat table from its path ("params.mid_block.resnets.0.conv1.kernel") to
the array, so that what made the tree (nnx, optax) may change and a part of it can be read alone.
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from agfsync_jax.models import lora
from agfsync_jax.scoring.columns import columns_of
from agfsync_jax.utils.files import absolute, is_url, read_json, to_path, write_text
from agfsync_jax.utils.signals import unhurried

PyTree = Any
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EARLY = "ended_early.json"
STARTED_FROM = "started_from.json"  # of a round: at which steps of those before it began


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
        best: the name of a metric; the checkpoint that was saved with its best value stays too.
        higher_is_better: whether the best value is the highest.
        alone: this process reads by itself, while the others do something else.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        best: str = "",
        higher_is_better: bool = True,
        alone: bool = False,
    ):
        self.folder = absolute(to_path(folder))
        self._best, self._sign = best, 1 if higher_is_better else -1
        self._needed = 0  # bytes of what was saved last
        self._leaves: dict[int, dict[str, tuple[int, ...]]] = {}
        policies = [managers.LatestN(keep)]
        if best:
            policies.append(
                managers.BestN(
                    get_metric_fn=self._rank,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        who = ocp.options.MultiprocessingOptions()
        if alone:
            me = jax.process_index()
            who = ocp.options.MultiprocessingOptions(me, {me}, f"alone_{me}")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=self._rank if best else None,  # or metrics would not be stored
            create=not alone,
            multiprocessing_options=who,
            cleanup_tmp_directories=True,
        )
        # The handler is named so that a manager which has saved nothing can read, too.
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers=ocp.PyTreeCheckpointHandler(multiprocessing_options=who),
            options=options,
        )

    def __exit__(self, *_) -> None:
        with self._writing():
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that is whole; None in an empty folder."""
        return self._manager.latest_step()

    def _rank(self, metrics: Mapping[str, float]) -> float:
        """More is better; what is not a number is worst."""
        value = self._sign * metrics[self._best]
        return -math.inf if math.isnan(value) else value

    def steps(self) -> list[int]:
        """Those that are there."""
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """The step with the best value of the metric `best`, and that value; None before there is
        one."""
        found = {step: self._manager.metrics(step) for step in self.steps()}
        values = {step: each[self._best] for step, each in found.items() if each}
        values = {step: value for step, value in values.items() if math.isfinite(value)}
        if not values:
            return None
        step = max(values, key=lambda step: self._sign * values[step])
        return step, values[step]

    def end(self) -> None:
        """Says that the training ends at the newest step, before its last one."""
        write_text(self.folder / _EARLY, json.dumps({"step": self.latest_step()}) + "\n")

    def has_ended(self, num_steps: int) -> bool:
        """Whether a training of so many steps is over."""
        latest = self.latest_step() or 0
        return latest >= num_steps or read_json(self.folder / _EARLY).get("step") == latest > 0

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
        self._check_step(step)
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

    def leaves(self, step: int) -> dict[str, tuple[int, ...]]:
        """What is stored at a step: name -> shape.

        Raises FileNotFoundError where there is no such step.
        """
        self._check_step(step)
        if step not in self._leaves:  # a step is written once, and its metadata takes long to read
            found = self._manager.item_metadata(step)
            self._leaves[step] = {n: tuple(getattr(leaf, "shape", ())) for n, leaf in found.items()}
        return self._leaves[step]

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

    def _check_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            has = ", ".join(map(str, steps)) or "none"
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.folder} (has: {has})")

    def _check(self, step: int, abstract: dict[str, Any]) -> None:
        found = self.leaves(step)
        wrong = [f"{name}: missing" for name in abstract if name not in found]
        for name in (name for name in abstract if name in found):
            has, wants = found[name], tuple(getattr(abstract[name], "shape", ()))
            if has != wants:
                wrong.append(f"{name}: {has}, expected {wants}")
        if wrong:
            folder = self.folder / str(step)
            raise ValueError(f"the checkpoint {folder} does not fit the model: {'; '.join(wrong)}")


def find_step(
    folder: Path, which: str, num_steps: int, best: str = "", higher_is_better: bool = True
) -> int:
    """The step of a training that has ended which `--step` names: "last", "best" or a number.

    Args:
        num_steps: of the training, `config.train.num_steps`.
        best: `config.train.best`.
        higher_is_better: of that metric.

    Raises:
        FileNotFoundError: `folder` holds no checkpoint.
        ValueError: the training is not over, as half-trained images would stay when it is; there is
            no such step, or no best one.
    """
    if not to_path(folder).is_dir():
        raise FileNotFoundError(f"no checkpoints in {folder}; run `agfsync train` first")
    with Checkpoints(folder, best=best, higher_is_better=higher_is_better) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoints in {folder}; run `agfsync train` first")
        if not checkpoints.has_ended(num_steps):
            raise ValueError(
                f"{folder} ends at step {steps[-1]} of config.train.num_steps={num_steps}:"
                " run `agfsync train` to the end first"
            )
        if which == "last":
            return steps[-1]
        if which == "best":
            found = checkpoints.best() if best else None
            if found is None:
                raise ValueError(
                    f"--step=best: {folder} has no checkpoint with a validation's"
                    f" {best or 'metric'}: train with config.train.best and"
                    " config.train.validate_every, or take --step=last"
                )
            return found[0]
        if int(which) not in steps:
            has = ", ".join(map(str, steps))
            raise ValueError(f"--step={which}: {folder} has the steps {has} (config.train.keep)")
        return int(which)


def is_higher_better(config: Any) -> bool:
    """Of the metric `config.train.best`."""
    best = config.train.best
    if not best or best.startswith("held_out/"):
        return best != "held_out/loss"
    return columns_of(config)[best].higher_is_better


def trained_rounds(
    workdir: Path, last: int, config: Any, which: str = "last"
) -> list[tuple[Path, int]]:
    """(folder of checkpoints, step) of what round `last` has trained, for `restore_denoiser`; with
    LoRA of all rounds up to it, whose adapters add up. Of an earlier round that is the step where
    round `last` began.

    Args:
        which: see `find_step`, which says what is raised.
    """
    train, higher = config.train, is_higher_better(config)
    rounds = range(0 if train.lora_rank else last, last + 1)
    *earlier, own = [to_path(workdir) / f"round_{index:03d}" / "checkpoints" for index in rounds]
    began = read_json(own.with_name(STARTED_FROM))
    found = [
        (each, began.get(each.parent.name) or find_step(each, "last", train.num_steps))
        for each in earlier
    ]
    return [*found, (own, find_step(own, which, train.num_steps, train.best, higher))]


def as_read(trained: Sequence[tuple[Path, int]]) -> dict[str, str]:
    """What `steps.runner.Job.reads` says of them."""
    folder, step = trained[-1]
    return {f"{folder.parent.name}/{folder.name}": f"step {step}"}


def restore_denoiser(
    trained: Sequence[tuple[Path, int]], base: PyTree, alone: bool = False
) -> PyTree:
    """The denoiser's parameters that a round's training has come to.

    Args:
        trained: see `trained_rounds`.
        base: what round 0 began with: arrays; where the step holds a whole denoiser, as the last
            ones do, their shapes and shardings will do.
        alone: see `Checkpoints`.

    Raises:
        FileNotFoundError: there is no such step.
        ValueError: the checkpoint is of another model: lists every parameter that does not fit.
    """
    with Checkpoints(trained[-1][0], alone=alone) as checkpoints:
        return _denoiser(checkpoints, trained, base, alone)


def _denoiser(
    checkpoints: Checkpoints, trained: Sequence[tuple[Path, int]], base: PyTree, alone: bool
) -> PyTree:
    """`restore_denoiser`, whose last checkpoints are open."""
    folder, step = trained[-1]
    leaves = checkpoints.leaves(step)
    name = _result_at(leaves)
    if not _adapters_at(leaves, name):
        return checkpoints.restore(step, {name: base})[name]
    adapters = lora.of_network(_adapters(checkpoints, step, like=base))
    start = restore_denoiser(trained[:-1], base, alone) if len(trained) > 1 else base
    return _merged(start, adapters)


def _merged(params: PyTree, adapters: lora.Adapters) -> PyTree:
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(lora.merge, out_shardings=places)(params, adapters)


def restore_trained(
    trained: Sequence[tuple[Path, int]],
    params: Mapping[str, PyTree],
    name: str,
    alone: bool = False,
) -> dict[str, PyTree]:
    """`params` of a backbone's networks, with what rounds' trainings have come to in place: of the
    denoiser, `name`, and of text encoders that have adapters; see `restore_denoiser`."""
    folder, step = trained[-1]
    with Checkpoints(folder, alone=alone) as checkpoints:
        tuned = dict(params) | {name: _denoiser(checkpoints, trained, params[name], alone)}
        leaves = checkpoints.leaves(step)
    adapted = [each for each in params if any(f".{each}." in leaf for leaf in leaves)]
    for folder, step in trained if adapted else ():
        adapters = restore_adapters(folder, step, like=params[name], alone=alone)
        for network in adapted:
            tuned[network] = _merged(tuned[network], lora.of_network(adapters, network))
    return tuned


def restore_adapters(
    folder: Path, step: int, like: PyTree = None, alone: bool = False
) -> lora.Adapters:
    """The LoRA adapters that a training has come to, whole on the devices of `like`.

    Raises:
        FileNotFoundError: there is no such step.
        ValueError: all of the denoiser was trained.
    """
    with Checkpoints(folder, alone=alone) as checkpoints:
        return _adapters(checkpoints, step, like)


def _adapters(checkpoints: Checkpoints, step: int, like: PyTree) -> lora.Adapters:
    """`restore_adapters` of checkpoints that are open."""
    places = {leaf.sharding for leaf in jax.tree.leaves(like)}
    place = next(iter(places), None)
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    leaves = checkpoints.leaves(step)
    apart = any(each.startswith("adapters.") for each in leaves)
    name = "adapters" if apart else _result_at(leaves)
    found = _adapters_at(leaves, name)
    if not found:
        where = f"{checkpoints.folder} has no LoRA adapters at step {step}"
        raise ValueError(f"{where}: all was trained")
    abstract = {
        module: {f: jax.ShapeDtypeStruct(pair[f], np.float32, sharding=place) for f in "AB"}
        for module, pair in found.items()
    }
    return checkpoints.restore(step, {name: abstract})[name]


def _result_at(leaves: Mapping[str, tuple[int, ...]]) -> str:
    """Under which name a checkpoint has what training has come to: see `Training.result`; of a step
    before the last one, a moving average has a name of its own."""
    average = "step" in leaves and any(each.startswith("ema.") for each in leaves)
    return "ema" if average else "params"


def _adapters_at(leaves: Mapping[str, tuple[int, ...]], name: str) -> dict[str, dict[str, tuple]]:
    """{module: {"A": shape, "B": shape}} of the adapters below a name; {} where there are none."""
    found: dict[str, dict[str, tuple]] = {}
    for path, shape in leaves.items():
        module, _, factor = path.removeprefix(f"{name}.").rpartition(".")
        if path.startswith(f"{name}.") and factor in ("A", "B"):
            found.setdefault(module, {})[factor] = shape
    return found


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
