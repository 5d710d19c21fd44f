"""Drawing: batches of images with random weights of real size, each of other prompts.

A step is a call of the denoiser with guidance. Both sides have the same files, steps, sampler,
guidance and batch, on one device. Each stays alive, so that it compiles once, and waits while the
other draws.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agfsync_jax import samplers
from agfsync_jax.benches import Bench, Measured, Task, _models, joined, load
from agfsync_jax.benches._ours import check_one_device
from agfsync_jax.benches._peers import Diffusers
from agfsync_jax.benches._processes import Process
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.utils import flops, modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.weights.networks import read_json

_DRAWING = ("height", "width", "num_inference_steps", "guidance_scale", "batch_size", "sampler")


def check(config: Any, against: str | None, platform: str) -> None:
    """Raises ValueError for an unknown model, dtype or sampler, or where the two cannot compete."""
    _models.check(config)
    modules.check("samplers", config.bench.sampler)
    check_one_device("sample", against, platform)


def measure(config: Any, home: Path, against: str | None, clock: Stage) -> Measured:
    """Draws in turn."""
    with _models.random_weights(config, home, clock) as (folder, _):
        return _measure(config, folder, against, clock)


def _measure(config: Any, folder: Path, against: str | None, clock: Stage) -> Measured:
    spec = config.bench
    settings = spec.to_dict()
    pipeline = read_json(folder / "model_index.json")["_class_name"]
    if "Img2Img" in pipeline:
        raise ValueError(
            f"config.bench.model={settings['model']} draws from images, not from texts"
        )
    drawing = {key: settings[key] for key in _DRAWING}
    batch = drawing["batch_size"]
    for key in ("height", "width"):
        drawing[key] = drawing[key] or _models.trained_size(folder)
    flop = _flop(folder, **drawing)  # raises for sizes and steps that cannot be
    clock.print(
        f"{drawing['height']}x{drawing['width']} pixels, {drawing['num_inference_steps']} steps, "
        f"guidance {drawing['guidance_scale']:g}, {settings['dtype']}: a batch of {batch} is "
        f"{flop / 1e12:.3g} TFLOP"
    )
    sampler = modules.load("samplers", drawing["sampler"]).SAMPLER
    asked = {
        "agfsync": drawing,
        "diffusers": drawing | {"scheduler": (sampler.scheduler, dict(sampler.variant))},
    }
    rows, about, first = [], {}, {}
    with contextlib.ExitStack() as stack, clock.progress(settings["repeats"] * batch) as progress:
        processes = {
            side: stack.enter_context(Process(make, side))
            for side, make in BENCH.sides(against).items()
        }
        for side, process in processes.items():
            process.ask("load", folder, settings["dtype"])
            first[side] = process.ask("prepare", _prompts(batch, 0), asked[side])
            about[side] = process.ask("about")
            clock.print(f"{side}: the first batch took {first[side]:.1f} s")
        for turn in range(1, 1 + settings["repeats"]):
            for side, process in processes.items():
                row = process.ask("draw", _prompts(batch, turn), turn)
                rows.append({"by": side, "first_seconds": first[side], **row})
                clock.print(
                    f"{side}: {batch} images in {row['seconds']:.2f} s, "
                    f"{row['step_seconds']:.3f} s a step"
                )
            progress.update(batch)
    return Measured([Task("", "images", batch, flop, rows)], joined(about), settings, spec.model)


def _prompts(batch: int, turn: int) -> list[str]:
    return [f"photograph {turn * batch + i} of an astronaut on a horse" for i in range(batch)]


def _flop(
    folder: Path,
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
    sampler: str,
) -> int:
    """What a batch takes: its texts and the empty one, the steps, the decoded images.

    Raises:
        ValueError: a size or a number of steps that the model cannot do.
    """
    # Plain attention's products are all counted.
    backbone = _models.abstract_backbone(folder, attention="plain")
    params, schedule = backbone.params, backbone.schedule
    num_calls = samplers.find(sampler, schedule).num_calls(schedule, num_inference_steps)
    guided = guidance_scale != 1
    rows = batch_size * (2 if guided else 1)

    def abstract(rows, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    shape, length = backbone.latent_shape(height, width), backbone.tokenize([""]).shape[1:]
    given = jax.eval_shape(backbone.encode_prompt, params, abstract(rows, length, jnp.int32))
    texts = abstract(batch_size + guided, length, jnp.int32)
    step = (params, abstract(rows, shape), abstract(rows, (), jnp.int32), given)
    return (
        flops.count(backbone.encode_prompt, params, texts)
        + num_calls * flops.count(backbone.denoise, *step)
        + flops.count(backbone.decode_latents, params, abstract(batch_size, shape))
    )


class Agfsync(load.Agfsync):
    """This package, drawing."""

    def prepare(self, prompts: Sequence[str], drawing: dict[str, Any]) -> float:
        """Compiles; seconds of the first batch."""
        backbone, params, guidance = (
            self.backbone,
            self.backbone.params,
            drawing["guidance_scale"],
        )
        mesh = create_mesh(devices=[self.device])
        sampler = samplers.find(drawing["sampler"], backbone.schedule)
        self._generator = Generator(backbone, mesh, **(drawing | {"sampler": sampler}))
        start = time.perf_counter()
        self._generator(params, prompts, range(len(prompts)), [False] * len(prompts))
        seconds = time.perf_counter() - start

        @jax.jit
        def step(params, latents, timesteps, given):
            denoise = guide(lambda *args: backbone.denoise(params, *args), given, given, guidance)
            return denoise(latents, timesteps)

        shape = backbone.latent_shape(drawing["height"], drawing["width"])
        given = jax.eval_shape(backbone.encode_prompt, params, backbone.tokenize(prompts))
        inputs = (
            jnp.ones((len(prompts), *shape)),
            jnp.ones(len(prompts), jnp.int32),
            jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), given),
        )
        self._step = lambda: step(params, *inputs).block_until_ready()
        self._step()
        return seconds

    def draw(self, prompts: Sequence[str], seed: int) -> dict[str, float]:
        """Seconds of a batch and of one guided call of the denoiser; peak memory so far."""
        seeds = range(seed, seed + len(prompts))
        self._step()  # the system may have laid pages aside while the other side drew
        start = time.perf_counter()
        self._generator(self.backbone.params, prompts, seeds, [False] * len(prompts))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        self._step()
        step_seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "step_seconds": step_seconds,
            "peak_bytes": self.peak_bytes(),
        }


BENCH = Bench(
    unit="images",
    ours=Agfsync,
    peers={"diffusers": Diffusers},
    libraries=("torch", "diffusers"),
    check=check,
    measure=measure,
)
