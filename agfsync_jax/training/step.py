"""One step of preference training, a pure function of state and batch."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from agfsync_jax.losses import Loss
from agfsync_jax.models import lora
from agfsync_jax.models.layers import rematerialized
from agfsync_jax.training.inversion import invert
from agfsync_jax.training.objective import ALL_NOISE, Noising, preference_loss

_MARGIN_DECAY = 0.99  # a step, of the mean that sets beta


class TrainState(NamedTuple):
    """What a step changes."""

    step: Int[Array, ""]  # steps done
    params: Any  # the denoiser's parameters, or its LoRA adapters
    opt_state: optax.OptState
    ema: Any  # the moving average of params, or None
    reference: Any = None  # of params too, what the loss compares with; None: it is frozen
    margin: Any = None  # the moving mean of margins' sizes at beta 1; None: beta is not set by it

    @property
    def averaged(self) -> Any:
        """What training has made: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


class StepSpec(NamedTuple):
    """What a step is made of; all of it is static."""

    loss: Loss  # with its settings
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    seed: int  # of noise and timesteps
    lora_rank: int = 0  # all of the denoiser is trained
    lora_targets: str = "attention"  # which kernels have adapters; models/lora.py, TARGETS
    lora_text_encoder: bool = False  # the text encoders' attention has adapters, too; wants encode
    lora_dropout: float = 0.0  # the share of activations that adapters do not see in a step
    accumulate: int = 1  # parts that a batch is taken in, one after the other
    ema_decay: float = 0.0  # no moving average
    reference_decay: float = 0.0  # of the reference, which stays where it is
    auto_beta: float = 0.0  # what a pair of the mean margin still counts; beta is the loss's own
    remat: str = "none"  # what blocks keep for their gradient; models/layers.py, REMAT
    noising: Noising = ALL_NOISE  # which noise is learned
    encode: bool = False  # a batch has token_ids, which the frozen text encoder reads in every step
    backbone: Any = None  # once it is loaded; its `params` are not read

    @property
    def needs_base(self) -> bool:
        """Whether a step reads the denoiser where training started."""
        return bool(self.lora_rank or self.loss.uses_reference and not self.reference_decay)


def init_state(base: Any, spec: StepSpec, text: Mapping[str, Any] = {}) -> TrainState:
    """The state before the first step, with parameters of its own: steps overwrite them.

    Args:
        base: the denoiser's parameters.
        text: those of the text encoders, where they have adapters, too.
    """
    if spec.lora_rank:
        key, rank = jax.random.key(spec.seed), spec.lora_rank
        targets = lora.TARGETS[spec.lora_targets]
        params = lora.init_adapters(key, base, rank=rank, targets=targets)
        for network, own in text.items() if spec.lora_text_encoder else ():
            key = jax.random.fold_in(key, len(params))
            made = lora.init_adapters(key, own, rank=rank, targets=lora.TEXT_TARGETS)
            params |= {f"{network}.{name}": pair for name, pair in made.items()}
    else:
        params = jax.tree.map(jnp.copy, base)
    ema, reference = (
        jax.tree.map(jnp.copy, params) if decay else None
        for decay in (spec.ema_decay, spec.reference_decay)
    )
    # So that training starts with the loss's own beta.
    margin = jnp.float32(_logit(spec) / spec.loss.beta) if spec.auto_beta else None
    return TrainState(jnp.int32(0), params, spec.optimizer.init(params), ema, reference, margin)


def auto_beta(margin: Float[Array, ""], spec: StepSpec) -> Float[Array, ""]:
    """The beta with which a pair of this margin, at beta 1, counts `spec.auto_beta`: the share
    sigmoid(-beta margin) of what Diffusion-DPO's gradient would be for a pair that is all wrong.

    As SimpleTuner's Flow-DPO has it, whose bounds belong to its own loss. Here beta is that of the
    loss, or up to ten times as much or as little: before the policy moves, margins are roundings,
    and what they ask for has no meaning.
    """
    own = spec.loss.beta
    return jnp.clip(_logit(spec) / margin, own / 10, own * 10)


def _logit(spec: StepSpec) -> float:
    return math.log(1 / spec.auto_beta - 1)


def frozen_base(base: Any, spec: StepSpec) -> Any:
    """`base` as steps read it: at the precision of the computation, half the memory in bfloat16."""
    return _cast(base, spec.backbone.dtype)


def train_step(
    state: TrainState, frozen: Mapping[str, Any], batch: Mapping[str, Any], *, spec: StepSpec
) -> tuple[TrainState, dict[str, Array]]:
    """The next state, and metrics.

    The loss is a mean over examples: with `accumulate` gradients are the mean of the parts'. Losses
    that look at the whole batch (losses/kto.py, agfsync_norm.py) then look at a part.

    Args:
        state: see TrainState.
        frozen: "base", what `frozen_base` made of the denoiser where training started: the
            reference that does not move, and what LoRA adapts; None if neither is wanted. "text",
            the parameters of the text encoders, {} unless steps encode.
        batch: chosen_latents, rejected_latents [b, h, w, c], or latents [b, k, h, w, c]; scores and
            mask [b, k] of rankings, scores [b, 2] of pairs if the loss uses them; example [b];
            conditioning, a pytree of arrays [b, ...], or token_ids.
    """
    batch = _stacked(batch)
    loss = spec.loss
    if spec.auto_beta:
        beta = auto_beta(state.margin, spec)
        loss = loss.with_beta(beta)
    objective = _objective(state, frozen, loss, spec, spec.lora_dropout)
    differentiate = jax.grad(objective, has_aux=True)
    grads, metrics = _accumulated(differentiate, state.params, batch, spec.accumulate)
    metrics["grad_norm"] = optax.global_norm(grads)  # before clipping
    metrics["learning_rate"] = jnp.asarray(spec.learning_rate(state.step))
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if spec.ema_decay:
        # As diffusers' EMAModel: early averages forget faster.
        count = state.step.astype(jnp.float32) + 1
        decay = jnp.minimum(spec.ema_decay, (1 + count) / (10 + count))
        ema = optax.incremental_update(params, ema, 1 - decay)
    moved = state.reference
    if spec.reference_decay:
        moved = optax.incremental_update(params, moved, 1 - spec.reference_decay)
    margin = state.margin
    if spec.auto_beta:
        metrics["beta"] = beta
        size = metrics["rewards/margin_size"] / beta
        margin = _MARGIN_DECAY * margin + (1 - _MARGIN_DECAY) * size
    return TrainState(state.step + 1, params, opt_state, ema, moved, margin), metrics


def held_out_metrics(
    state: TrainState,
    frozen: Mapping[str, Any],
    batch: Mapping[str, Any],
    draw: Int[Array, ""],
    *,
    spec: StepSpec,
) -> dict[str, Array]:
    """The metrics of what training has made, on a batch that no step learns from.

    Args:
        state, frozen, batch: see `train_step`. Beta is the loss's own: validations are compared.
        draw: of noise and timesteps, which are the same at every state.
    """
    state = state._replace(step=draw)
    _, metrics = _objective(state, frozen, spec.loss, spec)(state.averaged, _stacked(batch))
    return metrics


def inversion_step(
    params: Any,
    text: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    spec: StepSpec,
    timesteps: Int[np.ndarray, " t"],
    wanted: Int[np.ndarray, " n"],
) -> Float[Array, "b n k h w c"]:
    """The noise of a batch's images by inversion; see inversion.py.

    Args:
        params: the denoiser's.
        text, batch: see `train_step`.
        timesteps: of the inversion.
        wanted: those of them whose noise is given.
    """
    batch, backbone = _stacked(batch), spec.backbone
    latents = batch["latents"]
    b, k = latents.shape[:2]
    conditioning = batch.get("conditioning")
    if conditioning is None:
        conditioning = backbone.encode_prompt(text, batch["token_ids"])
    conditioning = jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), conditioning)

    def denoise(x, times):
        return backbone.denoise({backbone.denoiser_name: params}, x, times, conditioning)

    rows = latents.reshape(b * k, *latents.shape[2:])
    noise = invert(denoise, backbone.schedule, rows, timesteps)
    noise = noise[:, np.flatnonzero(np.isin(timesteps, wanted))]
    return jnp.swapaxes(noise.reshape(b, k, *noise.shape[1:]), 1, 2)


def _stacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of pairs with latents [b, 2, h, w, c], as rankings have them."""
    batch = dict(batch)
    if "latents" not in batch:
        pair = batch.pop("chosen_latents"), batch.pop("rejected_latents")
        batch["latents"] = jnp.stack(pair, axis=1)
    return batch


def _objective(
    state: TrainState, frozen: Mapping[str, Any], loss: Loss, spec: StepSpec, dropout: float = 0.0
) -> Callable[[Any, dict[str, Any]], tuple[Array, dict[str, Array]]]:
    """(what is trained, a part of a batch) -> the loss and metrics, at a state's noise.

    What adapters drop depends on the seed, the step and a part's first example.
    """
    backbone, name = spec.backbone, spec.backbone.denoiser_name

    def denoise(params, *args):
        if not spec.lora_rank:
            params = _cast(params, backbone.dtype)
        with rematerialized(spec.remat):
            return backbone.denoise({name: params}, *args)

    if backbone.dtype == jnp.float16:
        denoise = _scaled_backward(denoise)

    def whole(trained, *drop):
        if not spec.lora_rank:
            return trained
        return lora.attach(frozen["base"], lora.of_network(trained), *drop)

    def encode(tokens, trained=None, *drop):
        text = frozen["text"]
        if trained is not None and spec.lora_text_encoder:
            text = {
                network: lora.attach(own, lora.of_network(trained, network), *drop)
                for network, own in text.items()
            }
        return backbone.encode_prompt(text, tokens)

    reference = whole(state.reference) if spec.reference_decay else frozen["base"]

    def objective(trained, part):
        drop = ()
        if dropout:
            key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
            drop = jax.random.fold_in(key, part["example"][0]), dropout
        if spec.encode:
            tokens = part.pop("token_ids")
            part["conditioning"] = encode(tokens, trained, *drop)
            if spec.lora_text_encoder and loss.uses_reference:
                part["reference_conditioning"] = encode(tokens, state.reference)
        return preference_loss(
            whole(trained, *drop),
            reference,
            part,
            loss=loss,
            denoise=denoise,
            schedule=backbone.schedule,
            seed=spec.seed,
            step=state.step,
            noising=spec.noising,
        )

    return objective


def _accumulated(
    differentiate: Callable, params: Any, batch: Mapping[str, Any], parts: int
) -> tuple[Any, dict]:
    """Gradients and metrics of a batch, computed in parts; metrics that are arrays are sums.

    From two parts on they have the gradient's noise and signal (arXiv:1812.06162, appendix A.1):
    the trace of the covariance of an example's gradient, and the squared norm of the mean of all
    that there could be. Both are unbiased and rough: the signal may be below zero.
    """
    if parts == 1:
        return differentiate(params, batch)

    def split(x):
        # Every parts-th row: with a sharded batch all devices have their rows of each part.
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    batch = jax.tree.map(split, batch)

    def add(total, part):
        grads, metrics = differentiate(params, part)
        metrics["grad_norm"] = optax.global_norm(grads)
        return jax.tree.map(jnp.add, total, grads), metrics

    grads, metrics = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
    grads = jax.tree.map(lambda x: x / parts, grads)
    size = jax.tree.leaves(batch)[0].shape[1]
    of_parts, of_all = jnp.mean(metrics.pop("grad_norm") ** 2), optax.global_norm(grads) ** 2
    metrics = {name: x.sum(0) if x.ndim > 1 else x.mean() for name, x in metrics.items()}
    metrics["gradient/noise"] = (of_parts - of_all) * size * parts / (parts - 1)
    metrics["gradient/signal"] = (of_all * parts - of_parts) / (parts - 1)
    return grads, metrics


def _scaled_backward(denoise: Callable) -> Callable:
    """`denoise` with float32 predictions, and gradients that float16 can hold on their way back.

    A loss is a mean over examples and elements: at a single element its gradient may be below
    float16's 6e-8. It enters the network scaled to a norm of 16, and the gradients of parameters,
    whose master copies are float32, are scaled back. Gradients are linear in it, so this is exact;
    a scale that is kept and tuned, as other trainers have one, and steps left out are not needed.
    """

    def wide(params, *args):
        return denoise(params, *args).astype(jnp.float32)

    def forward(params, *args):
        return jax.vjp(lambda params: wide(params, *args), params)

    def backward(pull, gradient):
        norm = optax.global_norm(gradient)
        scale = 16 / jnp.where(norm > 0, norm, 1)
        (grads,) = pull(gradient * scale)
        unscaled = jax.tree.map(lambda x: (x / scale).astype(x.dtype), grads)
        return unscaled, None, None, None  # latents, timesteps and conditioning are not trained

    scaled = jax.custom_vjp(wide)
    scaled.defvjp(forward, backward)
    return scaled


def _cast(params: Any, dtype: Any) -> Any:
    """Kernels in the computation's dtype, as layers would cast them, but before they are gathered.

    What has one dimension, norms and biases, stays float32.
    """
    dtype = jnp.dtype(dtype)

    def cast(leaf):
        wide = leaf.ndim > 1 and leaf.dtype == jnp.float32 and dtype.itemsize < 4
        return leaf.astype(dtype) if wide else leaf

    return jax.tree.map(cast, params)
