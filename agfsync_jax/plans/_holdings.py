"""What verbs hold without a program being compiled: weights on a device, files on a disk."""

import math
from pathlib import Path
from typing import Any

import jax

from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.plans import _chips, param_bytes
from agfsync_jax.plans.sample import abstract_backbone
from agfsync_jax.plans.score import abstract_blip2
from agfsync_jax.training import program

BLIP2 = ("vqa", "vqascore")  # scorers whose weights are counted
PNG_BYTES = 1.0  # a pixel; of photographs more


def drawing_bytes(config: Any, devices: list[jax.Device]) -> int:
    """Bytes of weights on a device while images are drawn."""
    mesh = create_mesh(config.mesh, devices=devices)
    spec = config.backbone
    return param_bytes(abstract_backbone(config, mesh, spec.path, spec.kind).params)


def scoring_bytes(config: Any, devices: list[jax.Device]) -> int:
    """Bytes of the BLIP-2s of the scorers on a device; what is no BLIP-2 is little beside it."""
    mesh = create_mesh(config.score.mesh, devices=devices)
    found = {}
    for spec in config.scorers.to_dict().values():
        if spec["name"] in BLIP2:
            shared = tuple(str(spec.get(key)) for key in ("path", "dtype", "sharding"))
            found[shared] = param_bytes(abstract_blip2(spec, mesh)[1])
    return sum(found.values())


def training_bytes(config: Any, devices: list[jax.Device]) -> tuple[int, int]:
    """(bytes on a device, of a checkpoint) of parameters, moments, gradients and the base."""
    mesh = program.create_train_mesh(config, devices)
    spec = config.backbone
    backbone = abstract_backbone(config, mesh, spec.path, spec.kind, param_dtype="float32")
    step = program.step_spec(config, mesh, backbone=backbone)
    base = backbone.params[backbone.denoiser_name]
    text = program.text_encoders(backbone.params)
    init = program.init_program(base, step, mesh, config.sharding, text)
    state = jax.eval_shape(init, base)
    # the gradient, and where a batch is taken in parts the sum of theirs
    held = param_bytes(state) + param_bytes(state.params) * (1 + (step.accumulate > 1))
    if step.needs_base:
        held += param_bytes(jax.eval_shape(program.freeze_program(base, step), base))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return held, whole


def memory(device: jax.Device) -> int | None:
    """Bytes that a device may use; a CPU's are its share of what the host has free."""
    if device.platform != "cpu":
        return _chips.memory(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    return free and free * 1024 // jax.local_device_count()


def drawn_bytes(config: Any) -> int:
    """Bytes of the candidates of a round on the disk: PNGs, and latents in float16."""
    pixels = config.sample.height * config.sample.width
    images = config.prompts.num_prompts * config.sample.num_candidates
    return round(images * pixels * (PNG_BYTES + 4 * 2 / 64))


def inversion_bytes(config: Any, num_timesteps: int) -> int:
    """Bytes of a round's inverted noise on the disk, in float16: of a pair, or a ranking, of each
    prompt. How many pairs there are of people's choices is not known before they are read."""
    images = config.sample.num_candidates if config.pair.strategy == "ranked" else 2
    pixels = config.sample.height * config.sample.width
    values = config.prompts.num_prompts * images * pixels * 4 / 64
    return round(2 * values * num_timesteps)
