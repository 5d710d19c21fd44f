"""What the two sides of a measurement share: each lives in a process of its own, on one device."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from agfsync_jax.benches._processes import HostMemory

# Images uint8 [b, h, w, 3], their prompts, and their questions with the whole "text".
Batch = tuple[np.ndarray, list[str], list[list[dict]]]
PAIR = ("chosen_latents", "rejected_latents")


class Side:
    """Made in its process, where what it imports is not measured; it has a `device_name()`, and
    `peak_bytes()`: peak memory so far, of the device, where it tells, else of the host.

    Attributes:
        libraries: what must be installed, and whose versions are told.
        memory: of the host, from before loading.
    """

    libraries: tuple[str, ...]
    memory: HostMemory

    def about(self) -> dict[str, Any]:
        versions = {name: version(name) for name in self.libraries}
        return {"device": self.device_name(), "versions": versions}

    def wait(self) -> None:
        """Until the device has done all that it was given."""

    def timed(self, function: Callable, *args: Any) -> tuple[float, Any]:
        """The seconds that it takes, and what it gives."""
        start = time.perf_counter()
        made = function(*args)
        self.wait()
        return time.perf_counter() - start, made


class Drawing(Side):
    """Has `_draw(prompts, seed)` for a batch, and `_step()` for a guided call of the denoiser."""

    def draw(self, prompts: Sequence[str], seed: int) -> dict[str, float]:
        """Seconds of a batch and of one step; peak memory so far."""
        self.timed(self._step)  # the system may have laid pages aside while the other side drew
        seconds, _ = self.timed(self._draw, prompts, seed)
        step_seconds, _ = self.timed(self._step)
        return {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "peak_bytes": self.peak_bytes(),
        }


class Training(Side):
    """Has `_batch(arrays)`, on its device, and `_step(batch)`, which gives the loss.

    Attributes:
        shapes: name -> of one example's latents [h, w, c], `PAIR`, and of their conditioning.
        size: pairs of a batch.
    """

    shapes: dict[str, tuple[int, ...]]
    size: int

    def train(self, turn: int, num_steps: int) -> dict[str, float]:
        """Seconds of some steps, the last one's loss, peak memory so far."""
        seeds = range(turn * num_steps, (turn + 1) * num_steps)
        batches = [self._batch(self._random(seed)) for seed in seeds]
        self.wait()

        def steps():
            for batch in batches:
                loss = self._step(batch)
            return float(loss)

        seconds, loss = self.timed(steps)
        return {
            "seconds": seconds,
            "loss": loss,
            "peak_bytes": self.peak_bytes(),
            "step_seconds": seconds / num_steps,
        }

    def _random(self, seed: int) -> dict[str, np.ndarray]:
        """A batch, the same on both sides."""
        rng = np.random.default_rng(seed)
        return {
            name: rng.standard_normal((self.size, *shape), np.float32)
            for name, shape in self.shapes.items()
        }
