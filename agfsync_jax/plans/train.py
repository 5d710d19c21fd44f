"""The step of `agfsync train`: its state, the frozen base, a batch of pairs.

A pair costs 8 forward passes of an image by formula (3 for policy and gradient, 1 for the
reference, for both images); 6 with LoRA, whose base needs no gradient, or without a reference.
What blocks run again (`config.train.remat`) is not in the formula, and is in the program.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from agfsync_jax.data.imports import bucket_sizes
from agfsync_jax.parallel.sharding import batch_sharding, batch_shards
from agfsync_jax.plans import Work, _holdings, placed
from agfsync_jax.plans._tables import gib
from agfsync_jax.plans.sample import abstract_backbone
from agfsync_jax.training import inversion, program

BATCH = "train.batch_size"


def work(config: Any, devices: Sequence[jax.Device], name: str) -> Work:
    """One run of the program is a step on a batch of pairs, or of rankings of all candidates.

    Raises:
        ValueError: settings that training refuses.
    """
    del name
    spec, mesh = config.train, program.create_train_mesh(config, devices)
    source = config.backbone.path, config.backbone.kind
    backbone = abstract_backbone(config, mesh, *source, param_dtype="float32")
    plain = backbone.plain()
    step = program.step_spec(config, mesh, backbone=backbone)
    ranked = step.loss.is_listwise and config.pair.strategy == "ranked"
    count = config.sample.num_candidates if ranked else 2
    base = backbone.params[backbone.denoiser_name]
    frozen: dict[str, Any] = {"base": None, "text": {}}
    if step.encode:
        frozen["text"] = program.text_encoders(backbone.params)
    init = program.init_program(base, step, mesh, config.sharding, frozen["text"])
    state = jax.eval_shape(init, base)
    if step.needs_base:
        frozen["base"] = jax.eval_shape(program.freeze_program(base, step), base)

    sizes = bucket_sizes(config.sample.height, config.sample.width, config.pair.buckets)
    shape = backbone.latent_shape(*max(sizes, key=math.prod))
    several = [f"images have up to {len(sizes)} shapes, and the step is compiled for each of them."]
    several *= len(sizes) > 1
    size = spec.batch_size
    tokens = jax.ShapeDtypeStruct((size, *plain.tokenize([""]).shape[1:]), jnp.int32)
    batch = {"example": jax.ShapeDtypeStruct((size,), jnp.int32)}
    if ranked:
        batch["latents"] = jax.ShapeDtypeStruct((size, count, *shape), jnp.float32)
    else:
        latents = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        batch |= {"chosen_latents": latents, "rejected_latents": latents}
    if spec.inversion_steps:
        batch["noise"] = jax.ShapeDtypeStruct((size, count, *shape), jnp.float32)
        batch["timesteps"] = jax.ShapeDtypeStruct((size,), jnp.int32)
    if step.loss.uses_scores or step.loss.is_listwise:
        batch["scores"] = jax.ShapeDtypeStruct((size, count), jnp.float32)
    if step.loss.is_listwise:
        batch["mask"] = jax.ShapeDtypeStruct((size, count), bool)
    if step.encode:
        batch["token_ids"] = tokens
    else:
        batch["conditioning"] = jax.eval_shape(plain.encode_prompt, plain.params, tokens)
    batch = placed(batch, batch_sharding(mesh))
    step_flops = program.step_flops(step, base, batch, frozen["text"])
    notes = (
        f"a step is of {size} {f'rankings of {count} images' if ranked else 'pairs'},"
        f" {program.forward_passes(step) * count // 2} passes of an image each by formula.",
        *several,
    )
    if spec.inversion_steps:
        noise = _holdings.inversion_bytes(config, len(inversion.wanted(config, plain.schedule)))
        notes += (
            f"before the first step up to {spec.inversion_steps} passes of each image find its"
            f" noise, which takes {gib(noise)} of disk.",
        )
    return Work(
        lowered=program.step_program(state, frozen, step, mesh).lower(state, frozen, batch),
        mesh=mesh,
        params=state,
        images=size,
        num_steps=step.accumulate,
        step_flops=step_flops // step.accumulate,
        rest_flops=0,
        total=spec.num_steps * size,
        rate=("pairs", size),
        help={
            f"fewer pairs a chip at once (--config.train.device_batch_size, now"
            f" {size // batch_shards(mesh) // step.accumulate})": size
            > batch_shards(mesh) * step.accumulate,
            "--config.train.remat=full": spec.remat != "full",
            f"parameters split by config.sharding over --config.mesh.fsdp chips (now"
            f" {dict(mesh.shape)})": True,
            "--config.train.lora_rank=8": not spec.lora_rank,
        },
        optimizer=(state.opt_state, state.ema, state.reference),
        unit=step.accumulate,
        notes=notes,
    )
