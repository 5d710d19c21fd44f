"""The compiled step of a config: for `agfsync train`, and ahead of time for `agfsync plan`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax.models.layers import REMAT
from agfsync_jax.parallel.sharding import batch_sharding, infer_shardings, replicated
from agfsync_jax.training.optimizer import make_optimizer
from agfsync_jax.training.step import Settings, init_state, train_step
from agfsync_jax.utils import flops, modules

EMBEDDINGS = ("cached", "step")
_OPTIMIZER = """optimizer learning_rate num_steps warmup_steps schedule weight_decay max_grad_norm
    momentum_dtype""".split()


def settings_of(config: Any, backbone: Any, round_index: int) -> Settings:
    """The step that `config.train` and `config.loss` describe.

    Raises:
        ValueError: settings that do not exist or do not go together.
    """
    spec, loss = config.train, config.loss.to_dict()
    if spec.embeddings not in EMBEDDINGS:
        raise ValueError(
            f"config.train.embeddings={spec.embeddings!r}: expected {' or '.join(EMBEDDINGS)}."
        )
    if spec.remat not in REMAT:
        raise ValueError(
            f"config.train.remat is {spec.remat!r}, expected one of {', '.join(REMAT)}."
        )
    if spec.best and not spec.validate_every:
        raise ValueError(
            f"config.train.best={spec.best!r} needs config.train.validate_every: only a validation"
            " says which checkpoint is the best."
        )
    if spec.keep < 1:
        raise ValueError(f"config.train.keep={spec.keep}: expected at least 1.")
    if spec.accumulate < 1 or spec.batch_size % spec.accumulate:
        raise ValueError(
            f"config.train.accumulate={spec.accumulate} does not divide"
            f" config.train.batch_size={spec.batch_size}."
        )
    optimizer, learning_rate = make_optimizer(**{name: spec[name] for name in _OPTIMIZER})
    # Each round has an order and a noise of its own.
    seed = int(np.random.SeedSequence((spec.seed, round_index)).generate_state(1)[0] >> 1)
    return Settings(
        backbone=backbone,
        loss=modules.load("losses", loss.pop("name")).LOSS.configured(**loss),
        optimizer=optimizer,
        learning_rate=learning_rate,
        seed=seed,
        lora_rank=spec.lora_rank,
        accumulate=spec.accumulate,
        ema_decay=spec.ema_decay,
        remat=spec.remat,
        encode=spec.embeddings == "step",
    )


def state_shardings(base: Any, settings: Settings, mesh: Mesh, rules: Any) -> Any:
    """Where a state's arrays are; adapters are small, and whole on every device."""
    abstract = jax.eval_shape(functools.partial(init_state, settings=settings), base)
    return infer_shardings(abstract, mesh, () if settings.lora_rank else rules)


def compile_step(
    settings: Settings, shardings: Any, frozen: Mapping[str, Any], mesh: Mesh
) -> Callable:
    """The step as one program, which takes the state's memory."""
    return jax.jit(
        functools.partial(train_step, settings=settings),
        in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, frozen), batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def passes(settings: Settings) -> int:
    """Forward passes of an image that a pair costs by formula: 3 for policy and gradient and 1 for
    the reference, for both images; one less with LoRA, whose base needs no gradient."""
    return 2 * (3 - bool(settings.lora_rank) + settings.loss.uses_reference)


def step_flops(
    settings: Settings, base: Any, batch: Mapping[str, Any], conditioning: Any | None
) -> int:
    """FLOP of a step by formula, on all devices.

    Args:
        base: the denoiser's parameters, or their shapes.
        batch: see `train_step`; arrays or their shapes.
        conditioning: of the batch, or None where the step makes it.
    """
    latents = batch.get("latents", batch.get("chosen_latents"))
    size = latents.shape[0] * (latents.shape[1] / 2 if latents.ndim == 5 else 1)
    plain = settings.backbone.plain()
    if conditioning is None:
        tokens = batch["token_ids"]
        conditioning = jax.eval_shape(plain.encode_prompt, plain.params, tokens)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), conditioning)
    rows = jax.ShapeDtypeStruct((latents.shape[0], *latents.shape[-3:]), latents.dtype)
    times = jax.ShapeDtypeStruct(rows.shape[:1], "int32")
    denoise = plain.denoise
    forward = flops.count(denoise, {plain.denoiser_name: base}, rows, times, first)
    return round(passes(settings) * forward * size / rows.shape[0])
