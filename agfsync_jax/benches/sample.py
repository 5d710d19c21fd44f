"""Drawing: batches of images with random weights of real size, each of other prompts.

A step is a call of the denoiser with guidance. Both sides have the same files, steps, sampler,
guidance and batch, on one device. Each stays alive, so that it compiles once, and waits while the
other draws.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agfsync_jax import samplers
from agfsync_jax.benches import Bench, Measured, Sides, Task, _models, load
from agfsync_jax.benches._peers import Diffusers
from agfsync_jax.benches._sides import Drawing
from agfsync_jax.benches._turns import in_turns
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans.sample import drawing_flops
from agfsync_jax.utils import flops, modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights.networks import read_json


def check(config: Any) -> None:
    """Raises ValueError for an unknown model, dtype or sampler."""
    _models.check(config)
    modules.check("samplers", config.bench.sampler)


def measure(config: Any, home: Path, sides: Sides, clock: Stage) -> Measured:
    """Draws in turn."""
    spec = config.bench
    with _models.random_weights(config, home, clock) as (folder, _):
        if "Img2Img" in read_json(folder / "model_index.json")["_class_name"]:
            raise ValueError(f"config.bench.model={spec.model} draws from images, not from texts")
        drawing = {
            "height": spec.height or _models.trained_size(folder),
            "width": spec.width or _models.trained_size(folder),
            "num_inference_steps": spec.num_inference_steps,
            "guidance_scale": spec.guidance_scale,
        }
        sampler = modules.load("samplers", spec.sampler).SAMPLER
        flop = _flop(folder, spec.batch_size, drawing, sampler)
        clock.print(
            f"{drawing['height']}x{drawing['width']} pixels, {spec.num_inference_steps} steps, "
            f"guidance {spec.guidance_scale:g}, {spec.dtype}: a batch of {spec.batch_size} is "
            f"{flop / 1e12:.3g} TFLOP"
        )
        named = {"agfsync": spec.sampler, "diffusers": (sampler.scheduler, dict(sampler.variant))}
        task = Task("", "images", spec.batch_size, flop, [])

        def prompts(turn):
            rows = range(turn * spec.batch_size, (turn + 1) * spec.batch_size)
            return [f"photograph {i} of an astronaut on a horse" for i in rows]

        def start(side, ask):
            ask("load", folder, spec.dtype)
            return [ask("prepare", prompts(0), drawing, named[side])]

        about = in_turns(
            *(sides, [task], clock),
            turns=spec.repeats,
            items=spec.batch_size,
            start=start,
            turn=lambda side, ask, task, number: ask("draw", prompts(number), number),
        )
    return [task], about


def _flop(folder: Path, batch_size: int, drawing: dict, sampler: samplers.Sampler) -> int:
    """What a batch takes: its texts and the empty one, the steps, the decoded images; ValueError
    for a size or a number of steps that the model cannot do."""
    # Plain attention's products are all counted.
    backbone = _models.abstract_backbone(folder, attention="plain")
    num_calls = sampler.num_calls(backbone.schedule, drawing["num_inference_steps"])
    guided = drawing["guidance_scale"] != 1
    shape = backbone.latent_shape(drawing["height"], drawing["width"])
    step, decoding = drawing_flops(backbone, shape, batch_size, guided)
    texts = backbone.tokenize([""] * (batch_size + guided))
    encoding = flops.count(backbone.encode_prompt, backbone.params, texts)
    return encoding + num_calls * step + decoding


class Agfsync(load.Agfsync, Drawing):
    """This package, drawing."""

    def prepare(self, prompts: Sequence[str], drawing: dict[str, Any], sampler: str) -> float:
        """Compiles; seconds of the first batch."""
        backbone, params = self.backbone, self.backbone.params
        self._generator = Generator(
            backbone,
            create_mesh(devices=[self.device]),
            batch_size=len(prompts),
            sampler=samplers.find(sampler, backbone.schedule),
            **drawing,
        )
        seconds, _ = self.timed(self._draw, prompts, 0)

        @jax.jit
        def step(params, latents, timesteps, given):
            denoise = functools.partial(backbone.denoise, params)
            guided = guide(denoise, given, given, drawing["guidance_scale"])
            return guided(latents, timesteps)

        given = jax.eval_shape(backbone.encode_prompt, params, backbone.tokenize(prompts))
        inputs = (
            jnp.ones((len(prompts), *self._generator.latent_shape)),
            jnp.ones(len(prompts), jnp.int32),
            jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), given),
        )
        self._step = lambda: step(params, *inputs).block_until_ready()
        self._step()
        return seconds

    def _draw(self, prompts: Sequence[str], seed: int) -> None:
        seeds = range(seed, seed + len(prompts))
        self._generator(self.backbone.params, prompts, seeds, [False] * len(prompts))


BENCH = Bench(
    unit="images",
    sides={"agfsync": Agfsync, "diffusers": Diffusers},
    check=check,
    measure=measure,
)
