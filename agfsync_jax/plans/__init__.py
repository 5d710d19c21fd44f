"""What `agfsync plan --verb=NAME` compiles: a verb a file.

A file exports `work(config, devices, name)`, which says what is compiled for the devices of a
topology of that name, without reading weights (ValueError or FileNotFoundError for a config that
the verb cannot run), and BATCH, the key of the config that says how large a batch is.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

_LOCAL = r"micro:.*|\w+:/.*"  # besides what is on this disk


class Work(NamedTuple):
    """What a verb runs over and over.

    Attributes:
        lowered: the program, with a loop over steps, or, if it is not `looped`, a single step.
        mesh: that it is for; on a topology of several, each does this on its own.
        params: its first argument, which lies on the chips all the time, with shardings.
        images: of one run of the program.
        num_steps: of the loop.
        step_flops: of one pass of it, on all chips of the mesh, as the model's formulas count.
        rest_flops: the same of what the program does once.
        total: images of the configured run.
        help: what would need less memory -> whether it is still to be had.
        rate: (unit, how many of it one run makes).
        notes: what a reader must know of it.
        looped: see `lowered`.
        beside: other programs with the same first argument that must fit too.
        optimizer: what of params is the optimizer's.
        unit: a chip's batch is a multiple of it.
    """

    lowered: jax.stages.Lowered
    mesh: Mesh
    params: Any
    images: int
    num_steps: int
    step_flops: int
    rest_flops: int
    total: int
    help: dict[str, bool]
    rate: tuple[str, int]
    notes: tuple[str, ...] = ()
    looped: bool = True
    beside: tuple[jax.stages.Lowered, ...] = ()
    optimizer: Any = None
    unit: int = 1


def placed(tree: Any, places: Any, dtype: Any = None) -> Any:
    """Arrays that are not there, with their places: a sharding for all, or a tree of them."""

    def place(leaf, sharding):
        kept = leaf.dtype if dtype is None else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=sharding)

    return jax.tree.map(place, tree, jax.tree.broadcast(places, tree))


def is_here(path: str) -> bool:
    """Whether a checkpoint needs no download."""
    return bool(path) and (bool(re.fullmatch(_LOCAL, path)) or Path(path).expanduser().exists())


def param_bytes(params: Any) -> int:
    """Bytes of a pytree on one device."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
