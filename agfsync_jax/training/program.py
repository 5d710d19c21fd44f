"""The programs of a config's training, for `agfsync train`, and ahead of time for `agfsync plan`.

Each is compiled when it is first called.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax.losses import Loss
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import (
    Rule,
    batch_sharding,
    batch_shards,
    infer_shardings,
    replicated,
)
from agfsync_jax.training.objective import Noising, load_loss
from agfsync_jax.training.optimizer import make_optimizer, with_lora_alpha
from agfsync_jax.training.step import (
    StepSpec,
    TrainState,
    frozen_base,
    held_out_metrics,
    init_state,
    inversion_step,
    train_step,
)
from agfsync_jax.utils import flops

_OPTIMIZER = """optimizer learning_rate num_steps warmup_steps schedule weight_decay max_grad_norm
    momentum_dtype""".split()
_STEP = """lora_rank lora_targets lora_text_encoder lora_dropout ema_decay reference_decay auto_beta
    remat""".split()


def create_train_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` that divides a batch; see `mesh_shape` for what is raised."""
    return create_mesh(config.mesh, devices=devices, batch_size=config.train.batch_size)


def step_spec(
    config: Any, mesh: Mesh | None = None, round_index: int = 0, backbone: Any = None
) -> StepSpec:
    """The step that `config.train` and `config.loss` describe.

    Args:
        mesh: of the training, whose devices take a batch in parts; without one there is one part.

    Raises:
        ValueError: settings that do not exist or do not go together.
    """
    spec = config.train
    optimizer, learning_rate = make_optimizer(**{name: spec[name] for name in _OPTIMIZER})
    if spec.lora_rank and spec.lora_alpha:
        optimizer = with_lora_alpha(optimizer, spec.lora_alpha / spec.lora_rank)
    loss = load_loss(config.loss.name, config.loss.get(config.loss.name, {}))
    check_use(loss, config)
    # Each round has an order and a noise of its own.
    seed = int(np.random.SeedSequence((spec.seed, round_index)).generate_state(1)[0] >> 1)
    return StepSpec(
        loss=loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        seed=seed,
        encode=spec.embeddings == "step",
        backbone=backbone,
        noising=Noising(**{name: spec[name] for name in Noising._fields}),
        accumulate=num_parts(spec.batch_size, spec.device_batch_size, mesh) if mesh else 1,
        **{name: spec[name] for name in _STEP},
    )


def check_use(loss: Loss, config: Any) -> None:
    """Raises ValueError for keys of `config.train` that the config's loss has no use for."""
    spec, name = config.train, f"config.loss.name={config.loss.name}"
    if spec.reference_decay and not loss.uses_reference:
        raise ValueError(
            f"config.train.reference_decay={spec.reference_decay} moves a reference, and {name} has"
            " none: set it to 0, or take another loss."
        )
    if spec.auto_beta and not (loss.uses_reference and loss.beta and loss.scales_rewards):
        raise ValueError(
            f"config.train.auto_beta={spec.auto_beta} sets the beta that scales rewards, and {name}"
            " has none: set it to 0, or take another loss, such as diffusion_dpo."
        )


def check_start(config: Any, first: Any, start: Any) -> None:
    """Raises ValueError for a denoiser of `config.train.start` that is not shaped as `first`, that
    of `config.backbone`; both are arrays, or their shapes."""
    shapes = [
        {jax.tree_util.keystr(keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (first, start)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"config.train.start={config.train.start} has a denoiser of other sizes than"
            f" config.backbone.path={config.backbone.path}, the reference."
        )


def num_parts(batch_size: int, device_batch_size: int, mesh: Mesh) -> int:
    """In how many parts, one after the other, a batch is taken.

    Args:
        batch_size: pairs on all devices, a multiple of the mesh's data x fsdp.
        device_batch_size: pairs that a device takes at once, at most; 0: all of its own.
    """
    own = batch_size // batch_shards(mesh)
    limit = min(device_batch_size or own, own)
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own <= parts * limit)


def text_encoders(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a backbone's networks that read prompts."""
    return {name: own for name, own in params.items() if name.startswith("text_encoder")}


def init_program(
    base: Any, spec: StepSpec, mesh: Mesh, rules: Sequence[Rule], text: Mapping[str, Any] = {}
) -> Callable[[Any], TrainState]:
    """base -> the state before the first step; adapters are small, and whole on every device.

    Args:
        text: the text encoders' parameters, or their shapes, where they have adapters.
    """
    text = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(text))
    init = functools.partial(init_state, spec=spec, text=text)  # whose values no adapter reads
    places = infer_shardings(jax.eval_shape(init, base), mesh, () if spec.lora_rank else rules)
    return jax.jit(init, out_shardings=places)


def freeze_program(base: Any, spec: StepSpec) -> Callable[[Any], Any]:
    """base -> what steps read of it, in the memory of `base`, which is gone then."""
    places = jax.tree.map(lambda x: x.sharding, base)
    return jax.jit(
        functools.partial(frozen_base, spec=spec), out_shardings=places, donate_argnums=0
    )


def step_program(
    state: TrainState, frozen: Mapping[str, Any], spec: StepSpec, mesh: Mesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """(state, frozen, batch) -> (state, metrics), see `train_step`; takes the state's memory.

    Args:
        state, frozen: arrays, or their shapes and shardings.
    """
    state, frozen = jax.tree.map(lambda x: x.sharding, (state, frozen))
    return jax.jit(
        functools.partial(train_step, spec=spec),
        in_shardings=(state, frozen, batch_sharding(mesh)),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


def held_out_program(
    state: TrainState, frozen: Mapping[str, Any], spec: StepSpec, mesh: Mesh
) -> Callable[..., dict[str, jax.Array]]:
    """(state, frozen, batch, draw) -> metrics, see `held_out_metrics`."""
    state, frozen = jax.tree.map(lambda x: x.sharding, (state, frozen))
    everywhere = replicated(mesh)
    return jax.jit(
        functools.partial(held_out_metrics, spec=spec),
        in_shardings=(state, frozen, batch_sharding(mesh), everywhere),
        out_shardings=everywhere,
    )


def inversion_program(
    params: Any,
    text: Mapping[str, Any],
    spec: StepSpec,
    mesh: Mesh,
    timesteps: np.ndarray,
    wanted: np.ndarray,
) -> Callable[..., jax.Array]:
    """(params, text, batch) -> noise, see `inversion_step`, whole on every process."""
    places = jax.tree.map(lambda x: x.sharding, (params, text))
    step = functools.partial(inversion_step, spec=spec, timesteps=timesteps, wanted=wanted)
    return jax.jit(
        step, in_shardings=(*places, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )


def forward_passes(spec: StepSpec) -> int:
    """Forward passes that a pair costs by formula: of each image 3 for policy and gradient, and 1
    for the reference; one less with LoRA, whose base needs no gradient."""
    return 2 * (3 - bool(spec.lora_rank) + spec.loss.uses_reference)


def step_flops(
    spec: StepSpec, denoiser: Any, batch: Mapping[str, Any], text: Mapping[str, Any]
) -> int:
    """FLOP of a step by formula, on all devices; without those of the text encoders.

    Args:
        denoiser: its parameters, or their shapes.
        batch, text: see `train_step`; arrays or their shapes.
    """
    latents = batch.get("latents", batch.get("chosen_latents"))
    size = latents.shape[0] * (latents.shape[1] / 2 if latents.ndim == 5 else 1)
    plain = spec.backbone.plain()
    if spec.encode:
        conditioning = jax.eval_shape(plain.encode_prompt, text, batch["token_ids"])
    else:
        conditioning = batch["conditioning"]
    rows = jax.ShapeDtypeStruct((latents.shape[0], *latents.shape[-3:]), latents.dtype)
    times = jax.ShapeDtypeStruct(rows.shape[:1], "int32")
    params = {plain.denoiser_name: denoiser}
    forward = flops.count(plain.denoise, params, rows, times, conditioning)
    return round(forward_passes(spec) * forward * size / rows.shape[0])
