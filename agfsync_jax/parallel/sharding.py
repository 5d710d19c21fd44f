"""Shardings from (path pattern, spec) rules, for parameters and optimizer state alike."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")

Rule = tuple[str, Sequence[Any] | str]
_SMALL = 2**16  # elements, below which an axis alone splits nothing


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over data and fsdp, the others are whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that `batch_sharding` splits a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def round_up(number: int, multiple: int) -> int:
    """The next multiple, such as of `batch_shards`."""
    return math.ceil(number / multiple) * multiple


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """A batch of `size` rows: copies of the first fill it up, or zeros where there is none."""
    first = rows[:1] if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, np.repeat(first, size - len(rows), axis=0)])


def path_string(path: Sequence[Any]) -> str:
    """A key path of a pytree as "down_blocks.0.resnets.0.conv1.kernel"."""
    # An nnx.Variable is a node of its own; its leaf's attribute says nothing about the parameter.
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def infer_shardings(abstract_params: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """Gives every array of a pytree the spec of the first rule that fits its path.

    Args:
      abstract_params: pytree of arrays or jax.ShapeDtypeStruct: parameters, or optimizer state,
        whose paths end like those of the parameters.
      mesh: the mesh of the shardings.
      rules: (regex, spec) pairs; the regex is searched in "down_blocks.0.resnets.0.conv1.kernel".
        A spec has one entry per leading dimension: None, an axis, or several axes; or it is the
        name of one axis, which then splits the largest dimension that it divides, of arrays of
        at least 2**16 elements. An array that no rule fits is replicated.

    Returns:
      The same pytree with a NamedSharding at every array.

    Raises:
      ValueError: an axis that the mesh lacks or that a spec names twice, a spec longer than the
        array has dimensions, or a dimension that its axes do not divide. All are listed.
    """
    compiled = [(re.compile(pattern), pattern, spec) for pattern, spec in rules]
    errors = []

    def infer(path, leaf):
        name = path_string(path)
        for regex, pattern, spec in compiled:
            if regex.search(name):
                spec = _spec(spec, leaf.shape, mesh)
                found = _spec_errors(spec, leaf.shape, mesh)
                errors.extend(f"{name} {tuple(leaf.shape)}, rule {pattern!r}: {e}" for e in found)
                return replicated(mesh) if found else NamedSharding(mesh, spec)
        return replicated(mesh)

    shardings = jax.tree_util.tree_map_with_path(infer, abstract_params)
    if errors:
        raise ValueError("Sharding rules do not fit:\n  " + "\n  ".join(errors))
    return shardings


def _spec(spec: Sequence[Any] | str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """A spec as configs write it (lists, tuples, None, an axis alone) as a PartitionSpec."""
    if not isinstance(spec, str):
        return PartitionSpec(*(tuple(e) if isinstance(e, list | tuple) else e for e in spec))
    if spec not in mesh.shape:
        return PartitionSpec(spec)  # which is then told
    parts = mesh.shape[spec]
    fitting = [dim for dim, size in enumerate(shape) if size % parts == 0]
    if math.prod(shape) < _SMALL or not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda dim: (shape[dim], dim))  # of equal ones the last
    return PartitionSpec(*([None] * largest), spec)


def _spec_errors(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> list[str]:
    if len(spec) > len(shape):
        return [f"the spec has {len(spec)} entries, the array {len(shape)} dimensions"]
    per_dim = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
    named = [axis for axes in per_dim for axis in axes]
    if unknown := sorted(set(named) - set(mesh.shape)):
        return [f"unknown mesh axes {unknown}, the mesh has {', '.join(mesh.shape)}"]
    if len(set(named)) < len(named):
        return [f"an axis is named twice in {named}"]
    errors = []
    for dim, (size, axes) in enumerate(zip(shape, per_dim, strict=False)):
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            errors.append(f"dimension {dim} of size {size} is not divisible by {axes}, {parts}")
    return errors
