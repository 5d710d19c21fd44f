"""This package as one side of a measurement: on one device, in a process of its own."""

import os
from importlib.metadata import version
from typing import Any

import jax

from agfsync_jax.benches._processes import HostMemory, processor_name


def check_one_device(stage: str, against: str | None, platform: str) -> None:
    """Raises ValueError for several processes, or another device than the peer's."""
    if against and platform not in ("cpu", "gpu"):
        raise ValueError(f"--against={against} runs on a CPU or a GPU, and JAX on a {platform}")
    if jax.process_count() > 1:
        raise ValueError(f"agfsync bench --stage={stage} measures one device: run one process")


class Ours:
    """What the stages' own classes share. Made where it is measured, as its peer is."""

    memory: HostMemory  # from before loading

    def __init__(self):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves the peer its part of a GPU
        jax.config.update("jax_enable_compilation_cache", False)  # its time is a figure
        self.device = jax.local_devices()[0]
        jax.device_put(0.0).block_until_ready()

    def peak_bytes(self) -> int:
        """Peak memory so far: of the device, where it tells, else of the host."""
        found = self.device.memory_stats() or {}
        return found.get("peak_bytes_in_use") or self.memory.peak()

    def about(self) -> dict[str, Any]:
        cpu = self.device.platform == "cpu"
        return {
            "device": processor_name() if cpu else self.device.device_kind,
            "versions": {name: version(name) for name in ("jax", "flax")},
        }
