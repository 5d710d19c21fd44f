"""The device mesh that every verb shares."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")


def create_mesh(
    spec: Mapping[str, int] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    batch_size: int = 0,
) -> Mesh:
    """Makes a mesh with the axes data, fsdp and tensor.

    Args:
      spec: see `mesh_shape`; by default all devices are on `data`.
      devices: the devices to use, all devices of all processes by default.
      batch_size: see `mesh_shape`.

    Raises:
      ValueError: see `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(spec or {"data": -1}, len(devices), batch_size)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(spec: Mapping[str, int], num_devices: int, batch_size: int = 0) -> tuple[int, ...]:
    """The sizes of the axes data, fsdp and tensor on so many devices.

    Args:
      spec: axis name -> size; -1 (one axis at most) takes all devices that the other axes leave,
        an axis that is not named has size 1.
      batch_size: what data and fsdp must divide, if it is not 0. Where they do not, an axis of -1
        takes as many devices as do, and `tensor` those that are left.

    Raises:
      ValueError: an unknown axis, a size below 1, a product unlike the number of devices, or a
        batch that no such mesh divides.
    """
    if unknown := sorted(set(spec) - set(AXES)):
        raise ValueError(f"Unknown mesh axes {unknown}; the axes are {', '.join(AXES)}.")
    shape = {axis: int(spec.get(axis, 1)) for axis in AXES}
    text = ", ".join(f"{axis}={size}" for axis, size in shape.items())
    free = [axis for axis, size in shape.items() if size == -1]
    if any(size < 1 and size != -1 for size in shape.values()) or len(free) > 1:
        raise ValueError(f"Mesh {text}: sizes are at least 1, and one axis at most may be -1.")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if free and num_devices % fixed == 0:
        shape[free[0]] = num_devices // fixed
    if math.prod(shape.values()) != num_devices:
        raise ValueError(
            f"Mesh {text} does not fit {num_devices} device(s): the fixed axes take {fixed}. "
            "Set the sizes so that their product is the number of devices, or one of them to -1."
        )
    if batch_size and batch_size % (shape["data"] * shape["fsdp"]):
        others = fixed // shape["tensor"]
        if free in ([], ["tensor"]) or batch_size % others:
            raise ValueError(
                f"A batch of {batch_size} cannot be split over data x fsdp ="
                f" {shape['data'] * shape['fsdp']} of the mesh {text}: make it a multiple, or set"
                " one of these axes to -1."
            )
        shape[free[0]], left = math.gcd(batch_size // others, shape[free[0]]), shape[free[0]]
        shape["tensor"] *= left // shape[free[0]]
    return tuple(shape.values())


def local_mesh(spec: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of this process's own devices, where processes work on things of their own."""
    return create_mesh(spec, devices=jax.local_devices())
