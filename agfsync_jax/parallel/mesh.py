"""The device mesh that every verb shares."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def create_mesh(
    spec: Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh with the axes data, fsdp and tensor.

    Args:
      spec: axis name -> size; -1 (one axis at most) takes all devices that the other axes leave,
        an axis that is not named has size 1. By default all devices are on `data`.
      devices: the devices to use, all devices of all processes by default.

    Raises:
      ValueError: an unknown axis, a size below 1, or a product unlike the number of devices.
    """
    sizes = dict(spec or {"data": -1})
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"Unknown mesh axes {unknown}; the axes are {', '.join(AXES)}.")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(f"Mesh {text}: sizes are at least 1, and one axis at most may be -1.")
    num_devices = len(jax.devices() if devices is None else devices)
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape and num_devices % fixed == 0:
        shape[shape.index(-1)] = num_devices // fixed
    if math.prod(shape) != num_devices:
        raise ValueError(
            f"Mesh {text} does not fit {num_devices} device(s): the fixed axes take {fixed}. "
            "Set the sizes so that their product is the number of devices, or one of them to -1."
        )
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def local_mesh(spec: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of this process's own devices, where processes work on things of their own."""
    return create_mesh(spec, devices=jax.local_devices())
