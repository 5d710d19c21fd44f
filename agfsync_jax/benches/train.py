"""Training: steps of Diffusion-DPO with AdamW, on latents and text embeddings that are cached.

The denoiser is that of `config.bench.model`, with random weights; `config.bench.unet_width` makes
it narrower. A turn is `config.bench.num_train_steps` steps of `config.bench.batch_size` pairs, of
all of the denoiser or of `config.train.lora_rank`; precision, rematerialization and the optimizer
are those of `config.bench.dtype` and `config.train`, for both sides.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from agfsync_jax.benches import Bench, Measured, Task, _models, joined
from agfsync_jax.benches._ours import Ours, check_one_device
from agfsync_jax.benches._peers import SIDES, TorchTraining, random_batch
from agfsync_jax.benches._processes import HostMemory, Process
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import batch_sharding
from agfsync_jax.training import program
from agfsync_jax.utils.clock import Stage


def check(config: Any, against: str | None, platform: str) -> None:
    """Raises ValueError for an unknown model, another loss or optimizer than both sides have."""
    _models.check(config)
    if config.bench.num_train_steps < 1:
        raise ValueError(
            f"config.bench.num_train_steps={config.bench.num_train_steps}: expected at least 1"
        )
    if config.loss.name != "diffusion_dpo" or config.train.optimizer != "adamw":
        raise ValueError(
            f"agfsync bench --stage=train measures diffusion_dpo with adamw, not"
            f" {config.loss.name} with {config.train.optimizer}"
        )
    check_one_device("train", against, platform)


def measure(config: Any, home: Path, against: str | None, clock: Stage) -> Measured:
    """Both sides load and compile once, then take turns."""
    spec = config.bench
    sides = BENCH.sides(against)
    pairs = spec.num_train_steps * spec.batch_size
    rows, about, first = [], {}, {}
    with contextlib.ExitStack() as stack, clock.progress(spec.repeats * pairs) as progress:
        folder, _ = stack.enter_context(_models.random_weights(config, home, clock))
        shapes, work = _work(config, folder)
        clock.print(
            f"latents {list(shapes['latents'])}, {spec.dtype}: a step of {spec.batch_size} pairs is"
            f" {work / 1e12:.3g} TFLOP"
        )
        processes = {s: stack.enter_context(Process(make, s)) for s, make in sides.items()}
        for side, process in processes.items():
            process.ask("load", folder, spec.dtype, config.train.to_dict())
            first[side] = process.ask("prepare", config.to_dict(), shapes)
            about[side] = process.ask("about")
            clock.print(f"{side}: the first step took {first[side]:.1f} s")
        for turn in range(1, 1 + spec.repeats):
            for side, process in processes.items():
                row = process.ask("train", turn, spec.num_train_steps)
                row["step_seconds"] = row["seconds"] / spec.num_train_steps
                rows.append({"by": side, "first_seconds": first[side], **row})
                clock.print(
                    f"{side}: {pairs} pairs in {row['seconds']:.2f} s, loss {row['loss']:.4f}"
                )
            progress.update(pairs)
    task = Task("", "pairs", pairs, work * spec.num_train_steps, rows)
    return Measured([task], joined(about), spec.to_dict(), spec.model)


def _work(config: Any, folder: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of one example, latents and conditioning; and the FLOP of a step by formula."""
    spec = config.bench
    backbone = _models.abstract_backbone(folder, dtype=spec.dtype)
    pixels = spec.height or _models.trained_size(folder)
    latents = backbone.latent_shape(pixels, spec.width or pixels)
    given = jax.eval_shape(backbone.encode_prompt, backbone.params, backbone.tokenize([""]))
    shapes = {name: leaf.shape[1:] for name, leaf in given.items()}
    rows = {
        name: jax.ShapeDtypeStruct((spec.batch_size, *shape), jnp.float32)
        for name, shape in shapes.items()
    }
    pair = jax.ShapeDtypeStruct((spec.batch_size, *latents), jnp.float32)
    batch = {"chosen_latents": pair, "conditioning": rows}
    step = program.step_spec(config, backbone=backbone)
    return {"latents": latents, **shapes}, program.step_flops(
        step, backbone.params["unet"], batch, {}
    )


class Agfsync(Ours):
    """This package, training."""

    def load(self, folder: Path, dtype: str, settings: dict[str, Any]) -> None:
        self.memory = HostMemory()
        cls = _models.backbone_class(folder)
        self._mesh = create_mesh(devices=[self.device])
        self.backbone = cls.load(folder, dtype=dtype, mesh=self._mesh, only=["unet"])

    def prepare(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> float:
        """Compiles; seconds of the first step."""
        config = ConfigDict(config)
        self._shapes, self._size = shapes, config.bench.batch_size
        config.train.batch_size = self._size
        spec = program.step_spec(config, backbone=self.backbone)
        unet = self.backbone.params.pop("unet")
        self._state = program.init_program(unet, spec, self._mesh, ())(unet)
        self._frozen = {"base": program.freeze_program(unet, spec)(unet), "text": {}}
        self._step = program.step_program(self._state, self._frozen, spec, self._mesh)
        return self.train(0, 1)["seconds"]

    def train(self, turn: int, num_steps: int) -> dict[str, float]:
        """Seconds of some steps, the last one's loss, peak memory so far."""
        batches = [self._batch(turn * num_steps + i) for i in range(num_steps)]
        start = time.perf_counter()
        for batch in batches:
            self._state, metrics = self._step(self._state, self._frozen, batch)
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "loss": loss, "peak_bytes": self.peak_bytes()}

    def _batch(self, seed: int) -> dict[str, Any]:
        arrays = random_batch(self._shapes, self._size, seed)
        batch = {f"{side}_latents": arrays.pop(f"{side}_latents") for side in SIDES}
        batch |= {"example": np.arange(self._size, dtype=np.int32), "conditioning": arrays}
        return jax.device_put(batch, batch_sharding(self._mesh))


BENCH = Bench(
    unit="pairs",
    ours=Agfsync,
    peers={"diffusers": TorchTraining},
    libraries=("torch", "diffusers", "peft"),
    check=check,
    measure=measure,
)
