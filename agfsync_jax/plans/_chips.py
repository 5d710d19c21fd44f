"""Chips that need not be here: what they have, by published numbers, and a topology's devices.

A host without an accelerator compiles for a TPU topology with libtpu alone.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

NAMES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x2")  # of those that libtpu knows


class Chip(NamedTuple):
    """One JAX device, a chip or (TPU7x) half a chip.

    Attributes:
        memory: bytes that a program may use.
        memory_bandwidth: bytes a second.
        network_bandwidth: bytes a second to the other chips, one way, over all links.
    """

    memory: int
    memory_bandwidth: float
    network_bandwidth: float


_GIB = 2**30
# jax.Device.device_kind -> the chip. Bandwidths of TPUs: docs.cloud.google.com/tpu/docs/{v4, v5e,
# v5p, v6e, tpu7x}, where the interconnect is given both ways; memory: what libtpu's compiler says
# is available, of 32, 16, 95, 32 and 2 x 96 GiB. GPUs: NVIDIA's data sheets, NVLink one way.
_CHIPS = (
    (r"TPU v4$", Chip(int(30.75 * _GIB), 1228e9, 300e9)),
    (r"TPU v5 ?(lite|e)", Chip(int(15.75 * _GIB), 819e9, 200e9)),
    (r"TPU v5", Chip(int(95.74 * _GIB), 2765e9, 600e9)),
    (r"TPU v6", Chip(int(31.25 * _GIB), 1638e9, 400e9)),
    (r"TPU ?v?7", Chip(int(94.75 * _GIB), 3690e9, 300e9)),
    (r"H100 80GB HBM3", Chip(80 * _GIB, 3350e9, 450e9)),
    (r"H200", Chip(141 * 10**9, 4800e9, 450e9)),
    (r"A100-SXM4-80GB", Chip(80 * _GIB, 2039e9, 300e9)),
    (r"A100-SXM4-40GB", Chip(40 * _GIB, 1555e9, 300e9)),
)


def chip(device: jax.Device) -> Chip | None:
    """What a device has; None where it is not known."""
    return next((c for kind, c in _CHIPS if re.search(kind, device.device_kind)), None)


def memory(device: jax.Device) -> int | None:
    """Bytes that a program may use: what a device that is here says, else the published number."""
    try:
        return device.memory_stats()["bytes_limit"]
    except (jax.errors.JaxRuntimeError, KeyError, TypeError):
        found = chip(device)
        return found.memory if found else None


def devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as "v5e:4x4", to compile for; nothing runs on them.

    Raises:
        ValueError: no such topology, or no libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if not match:
        raise ValueError(f"--topology={name}: expected KIND:SHAPE, such as {', '.join(NAMES)}.")
    _prepare_libtpu()
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if match[1] == "v4" else {}  # a chip is one device
    if set(match[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # by default a host has four
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology={name}: libtpu does not know it, or cannot start ({error}). Expected "
            f"something like {', '.join(NAMES)}; a shape is made of whole hosts."
        ) from error
    except RuntimeError as error:  # jax looks for the library, and it is not there
        raise ValueError(
            "Compiling for a TPU needs libtpu, which is not installed: `pip install jax[tpu]`, or "
            "the version of libtpu that the installed jax asks for. It runs on x86-64 Linux, and "
            "needs no TPU."
        ) from error
    return list(found.devices)


def one_process(name: str, own: Sequence[jax.Device]) -> list[jax.Device]:
    """The devices of one process of a topology, or of this one where the devices are here.

    They are a topology of their own: libtpu compiles ahead of time for no part of a larger one.
    """
    first = [device for device in own if device.process_index == own[0].process_index]
    if len(first) == len(own) or ":" not in name:
        return first
    kind, shape = name.split(":")
    sides = np.ptp([device.coords for device in first], axis=0) + 1
    return devices(f"{kind}:{'x'.join(map(str, sides[: shape.count('x') + 1]))}")


def _prepare_libtpu() -> None:
    """The environment in which libtpu starts on a host without a TPU; read once, when it loads."""
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any will do: topologies bring their own
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so others may compile as well
    }.items():
        os.environ.setdefault(key, value)
    # In the stack that its threads have by default, choosing windows for a UNet's convolutions
    # runs over and kills the process.
    flag, given = "--fibers_default_thread_stack_size", os.environ.get("LIBTPU_INIT_ARGS", "")
    if flag not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flag}={2**22}".strip()
