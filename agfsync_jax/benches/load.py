"""Loading: from a model's files to its parameters on the device, of real size and random.

Every load is in a fresh process; the files are read before, so that all find them cached.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.benches import Bench, Measured, Sides, Task, _models
from agfsync_jax.benches._peers import Diffusers
from agfsync_jax.benches._processes import HostMemory, Process
from agfsync_jax.benches._turns import Ours
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils.clock import Stage


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Loads in turn, each time in a fresh process."""
    spec = config.bench
    task, about = Task("", "loads", 1, 0, []), {}
    with _models.random_weights(config, home, clock) as (folder, size):
        held = size * jnp.dtype(spec.param_dtype).itemsize // jnp.dtype(spec.file_dtype).itemsize
        for _ in range(spec.repeats):
            for side, make in sides.items():
                _warm(folder, held)
                with Process(make, side) as process:
                    row = {"by": side, **process.ask("load", folder, spec.param_dtype)}
                    about[side] = process.ask("about")
                task.rows.append(row)
                held = row["held_bytes"]
                clock.print(
                    f"{side}: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB of host"
                    f" memory, {row['peak_bytes'] / held:.2f} of the {held / 1e9:.2f} GB held"
                )
    return [task], about


def _warm(folder: Path, held: int) -> None:
    """Makes the start alike for whoever comes next: files in the page cache, memory touched.

    A virtual machine may have given memory back to its host, and taking it again is slow.
    """
    buffer = bytearray(2**24)
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    np.ones(held, np.uint8)


class Agfsync(Ours):
    """This package, loading."""

    def __init__(self):
        from transformers import CLIPTokenizer  # noqa: F401 - imports are not measured

        super().__init__()

    def load(self, folder: Path, dtype: str) -> dict[str, float]:
        cls = _models.backbone_class(folder)
        self.memory = HostMemory()
        start = time.perf_counter()
        mesh = create_mesh(devices=[self.device])
        self.backbone = cls.load(folder, dtype=dtype, param_dtype=dtype, mesh=mesh)
        jax.block_until_ready(self.backbone.params)
        seconds = time.perf_counter() - start
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.backbone.params))
        return {"seconds": seconds, "held_bytes": held, "peak_bytes": self.memory.peak()}


BENCH = Bench(
    unit="loads",
    sides={"agfsync": Agfsync, "diffusers": Diffusers},
    check=_models.check,
    measure=measure,
    one_device=False,
)
