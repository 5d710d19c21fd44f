"""Training: steps of Diffusion-DPO with AdamW, on latents and text embeddings that are cached.

The denoiser is that of `config.bench.model`, with random weights; `config.bench.unet_width` makes
it narrower. A turn is `config.bench.num_train_steps` steps of `config.bench.batch_size` pairs, of
all of the denoiser or of `config.train.lora_rank`; precision, rematerialization and the optimizer
are those of `config.bench.dtype` and `config.train`, for both sides.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from agfsync_jax.benches import Bench, Measured, Sides, Task, _models
from agfsync_jax.benches._peers import TorchTraining
from agfsync_jax.benches._processes import HostMemory
from agfsync_jax.benches._sides import PAIR, Training
from agfsync_jax.benches._turns import Ours, in_turns
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import batch_sharding
from agfsync_jax.training import program
from agfsync_jax.utils.clock import Stage


def check(config: Any) -> None:
    """Raises ValueError for an unknown model, another loss or optimizer than both sides have."""
    _models.check(config)
    if config.loss.name != "diffusion_dpo" or config.train.optimizer != "adamw":
        raise ValueError(
            f"agfsync bench --stage=train measures diffusion_dpo with adamw, not"
            f" {config.loss.name} with {config.train.optimizer}"
        )


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Trains in turn."""
    spec = config.bench
    pairs = spec.num_train_steps * spec.batch_size
    with _models.random_weights(config, home, clock) as (folder, _):
        shapes, work = _work(config, folder)
        clock.print(
            f"latents {list(shapes[PAIR[0]])}, {spec.dtype}: a step of {spec.batch_size} pairs is"
            f" {work / 1e12:.3g} TFLOP"
        )
        task = Task("", "pairs", pairs, work * spec.num_train_steps, [])
        about = in_turns(
            *(sides, [task], clock),
            turns=spec.repeats,
            items=pairs,
            start=lambda side, ask: [ask("load", folder, config.to_dict(), shapes)],
            turn=lambda side, ask, task, number: ask("train", number, spec.num_train_steps),
        )
    return [task], about


def _work(config: Any, folder: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of one example, latents and conditioning; and the FLOP of a step by formula."""
    spec = config.bench
    backbone = _models.abstract_backbone(folder, dtype=spec.dtype)
    pixels = spec.height or _models.trained_size(folder)
    latents = backbone.latent_shape(pixels, spec.width or pixels)
    given = jax.eval_shape(backbone.encode_prompt, backbone.params, backbone.tokenize([""]))
    shapes = dict.fromkeys(PAIR, latents) | {name: leaf.shape[1:] for name, leaf in given.items()}
    batch = {
        name: jax.ShapeDtypeStruct((spec.batch_size, *shape), jnp.float32)
        for name, shape in shapes.items()
    }
    batch["conditioning"] = {name: batch[name] for name in given}
    step = program.step_spec(config, backbone=backbone)
    return shapes, program.step_flops(step, backbone.params["unet"], batch, {})


class Agfsync(Ours, Training):
    """This package, training."""

    def load(self, folder: Path, config: dict[str, Any], shapes: dict[str, tuple]) -> float:
        """Loads and compiles; seconds of the first step."""
        self.memory = HostMemory()
        config = ConfigDict(config)
        self.shapes, self.size = shapes, config.bench.batch_size
        config.train.batch_size = self.size
        self._mesh = mesh = create_mesh(devices=[self.device])
        settings = {"dtype": config.bench.dtype, "mesh": mesh, "only": ["unet"]}
        backbone = _models.backbone_class(folder).load(folder, **settings)
        spec = program.step_spec(config, backbone=backbone)
        unet = backbone.params.pop("unet")
        self._state = program.init_program(unet, spec, mesh, ())(unet)
        self._frozen = {"base": program.freeze_program(unet, spec)(unet), "text": {}}
        self._program = program.step_program(self._state, self._frozen, spec, mesh)
        return self.train(0, 1)["seconds"]

    def _batch(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        batch = {name: arrays.pop(name) for name in PAIR}
        batch |= {"example": np.arange(self.size, dtype=np.int32), "conditioning": arrays}
        return jax.device_put(batch, batch_sharding(self._mesh))

    def _step(self, batch: dict[str, Any]) -> jax.Array:
        self._state, metrics = self._program(self._state, self._frozen, batch)
        return metrics["loss"]


BENCH = Bench(
    unit="pairs",
    sides={"agfsync": Agfsync, "diffusers": TorchTraining},
    check=check,
    measure=measure,
    counts=("num_train_steps",),
)
