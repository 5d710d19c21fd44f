"""Train: pairs -> checkpoints/, the denoiser tuned on a round's preference pairs.

The loss is a file of agfsync_jax/losses (`config.loss`; Diffusion-DPO by default). All of the
denoiser is trained, or LoRA adapters on its attention (`config.train.lora_rank`). Round 0 starts
from `config.backbone`, a later round from the one before; where a round starts is its reference.

Text embeddings are computed once per distinct prompt and kept in main memory, as the text encoder
is frozen; where the pairs store them (`config.pair.embeddings`), they are read instead. Order and
noise depend on (seed, round, step) alone: stopped and started again, on any number of devices, the
training goes on as if it had never stopped.
"""

import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from agfsync_jax import backbones
from agfsync_jax.data.embeddings import PromptEmbeddings
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.data.pairs import read_features, read_pairs, repair_pairs
from agfsync_jax.diffusion import lora
from agfsync_jax.diffusion.denoising import denoising_error
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.parallel.sharding import batch_sharding, infer_shardings, replicated
from agfsync_jax.utils import modules
from agfsync_jax.utils.checkpoints import Checkpoints, restore_denoiser
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.metrics import MetricWriter
from agfsync_jax.utils.optimizer import make_optimizer
from agfsync_jax.utils.signals import hold_signals

FIELDS = ("pair_id", "chosen_latents", "rejected_latents", "token_ids")
OPTIMIZER = "learning_rate num_steps warmup_steps schedule weight_decay max_grad_norm".split()


class TrainState(NamedTuple):
    """What a step changes."""

    step: Int[Array, ""]  # steps done
    params: Any  # the denoiser's parameters, or its LoRA adapters
    opt_state: optax.OptState


def draw_noise(
    seed: int, step: Array, example: Int[Array, " b"], shape: tuple[int, ...], num_timesteps: int
) -> tuple[Float[Array, "b ..."], Int[Array, " b"]]:
    """Noise [b, *shape] and timesteps [b] of a step; a row depends on (seed, step, example)."""
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(example):
        noise_key, time_key = jax.random.split(jax.random.fold_in(step_key, example))
        timestep = jax.random.randint(time_key, (), 0, num_timesteps)
        return jax.random.normal(noise_key, shape), timestep

    return jax.vmap(draw)(example)


def train_step(
    state: TrainState,
    base: Any,
    batch: dict[str, Any],
    *,
    denoise: Callable[[Any, Array, Array, Any], Array],
    schedule: Any,
    loss_fn: Callable,
    uses_reference: bool,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    lora_rank: int,
    seed: int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step of preference training: the next state, and metrics.

    Chosen and rejected go through the denoiser as one batch, with the same noise at the same
    timestep (Diffusion-DPO, arXiv:2311.12908, eq. 14).

    Args:
        state: see TrainState.
        base: the denoiser's parameters where the round started: the reference, and what LoRA
            adapts. None if the loss has no reference and all of the denoiser is trained.
        batch: chosen_latents, rejected_latents [b, h, w, c]; example [b]; conditioning, a pytree
            of arrays [b, ...].
        denoise: (parameters, latents, timesteps, conditioning) -> prediction.
        schedule: the noise schedule.
        loss_fn: see losses/; `uses_reference` says whether it is given the reference's errors.
        optimizer: its learning rate is `learning_rate`, given for the metrics.
        lora_rank: 0 if all of the denoiser is trained.
        seed: of noise and timesteps.
    """

    def twice(first, second):
        # Row by row, not half by half: with a sharded batch both rows then stay on their device.
        return jnp.stack([first, second], axis=1).reshape((-1,) + first.shape[1:])

    latents = twice(batch["chosen_latents"], batch["rejected_latents"])
    drawn = draw_noise(
        seed, state.step, batch["example"], latents.shape[1:], schedule.num_train_timesteps
    )
    inputs = jax.tree.map(lambda x: twice(x, x), (*drawn, batch["conditioning"]))

    def errors(params):
        both = denoising_error(denoise, params, latents, *inputs, schedule).reshape(-1, 2)
        return both[:, 0], both[:, 1]  # chosen, rejected

    reference = jax.lax.stop_gradient(errors(base)) if uses_reference else (None, None)

    def objective(trained):
        params = lora.merge(base, trained) if lora_rank else trained
        policy = errors(params)
        loss, metrics = loss_fn(*policy, *reference)
        metrics |= {"loss": loss, "chosen_error": policy[0], "rejected_error": policy[1]}
        return jnp.mean(loss), jax.tree.map(jnp.mean, metrics)

    grads, metrics = jax.grad(objective, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.global_norm(grads)  # before clipping
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), opt_state
    ), metrics


def init_state(base: Any, *, optimizer: Any, lora_rank: int, seed: int) -> TrainState:
    """The state before the first step, with parameters of its own: steps overwrite them."""
    if lora_rank:
        params = lora.init_adapters(jax.random.key(seed), base, rank=lora_rank)
    else:
        params = jax.tree.map(jnp.copy, base)
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Trains to `config.train.num_steps` steps, from the round's newest checkpoint if there is one.

    Ctrl-C and SIGTERM save the step that is under way, then stop.

    Raises:
        FileNotFoundError: no pairs, or no checkpoint of the round before.
        ValueError: settings that do not fit each other, the mesh, the model or the pairs.
        FloatingPointError: a loss or gradient that is not finite; names the step.
    """
    folders = [Path(workdir) / f"round_{index:03d}" for index in range(round_index + 1)]
    with (
        Stage(folders[-1], "train", unit="pairs") as stage,
        Checkpoints(folders[-1] / "checkpoints") as checkpoints,
    ):
        start = checkpoints.latest_step() or 0
        stage.skipped(start, config.train.num_steps, "steps")
        if start == config.train.num_steps:
            return
        if repair and multihost.is_main():
            repair_pairs(folders[-1] / "pairs")
        multihost.barrier("train repair")
        state, step, final = prepare(config, folders, checkpoints, start)
        fit(config.train, state, step, final, start, stage, checkpoints)


def prepare(
    config: Any, folders: list[Path], checkpoints: Checkpoints, start: int
) -> tuple[TrainState, Callable, Callable]:
    """Everything that the last round of `folders` needs to go on from step `start`.

    Returns:
        The state; step(state, index) -> (state, metrics), which takes the state's memory; and
        final(state), what the last checkpoint holds.
    """
    spec, mesh = config.train, create_mesh(config.mesh)
    optimizer, learning_rate = make_optimizer(**{name: spec[name] for name in OPTIMIZER})
    loss_spec = config.loss.to_dict()
    loss = modules.load("losses", loss_spec.pop("name"))
    # Each round has an order and a noise of its own.
    seed = int(np.random.SeedSequence((spec.seed, len(folders) - 1)).generate_state(1)[0] >> 1)
    folder = folders[-1] / "pairs"
    stored = [name for name in read_features(folder) if name.startswith("embeddings/")]
    pairs = read_pairs(folder, FIELDS, once=stored)
    loader = PairLoader(pairs, spec.batch_size, seed, mesh)

    name = backbones.backbone_class(config).denoiser_name
    backbone = backbones.load(config, mesh, only=[name] if stored else ())
    base = backbone.params[name]
    if len(folders) > 1:
        base = restore_denoiser(folders[-2] / "checkpoints", base, spec.num_steps)
    if stored:
        table = {name.removeprefix("embeddings/"): pairs.pop(name) for name in stored}
        embeddings = PromptEmbeddings(table, pairs["prompt_row"], mesh)
    else:
        embeddings = PromptEmbeddings.encode(backbone, pairs["token_ids"], spec.batch_size, mesh)
    backbone.params.clear()  # the other networks have done their part

    init = functools.partial(init_state, optimizer=optimizer, lora_rank=spec.lora_rank, seed=seed)
    abstract = jax.eval_shape(init, base)
    shardings = infer_shardings(abstract, mesh, () if spec.lora_rank else config.sharding)
    if start:
        places = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state = checkpoints.restore(start, places)
    else:
        state = jax.jit(init, out_shardings=shardings)(base)
    if not (spec.lora_rank or loss.uses_reference):
        base = None

    step = functools.partial(
        train_step,
        denoise=lambda params, *args: backbone.denoise({name: params}, *args),
        schedule=backbone.schedule,
        loss_fn=functools.partial(loss.loss, **loss_spec),
        uses_reference=loss.uses_reference,
        optimizer=optimizer,
        learning_rate=learning_rate,
        lora_rank=spec.lora_rank,
        seed=seed,
    )
    compiled = jax.jit(
        step,
        in_shardings=(shardings, jax.tree.map(lambda x: x.sharding, base), batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )

    def step_of(state, index):
        batch = loader.batch(index) | {"conditioning": embeddings(loader.rows(index))}
        return compiled(state, base, batch)

    def final(state):
        if not spec.lora_rank:
            return state
        # Other verbs read a whole denoiser, named "params".
        return {"params": jax.jit(lora.merge)(base, state.params), "adapters": state.params}

    return state, step_of, final


def fit(spec: Any, state: Any, step: Callable, final: Callable, start, stage, checkpoints) -> None:
    """Takes the steps from `start` to `spec.num_steps`, with metrics and checkpoints.

    A signal saves the step under way and is raised then.
    """
    with (
        MetricWriter(checkpoints.folder / "metrics.jsonl", start, multihost.is_main()) as writer,
        stage.progress((spec.num_steps - start) * spec.batch_size) as progress,
        hold_signals(signal.SIGINT, signal.SIGTERM) as held,
    ):
        clock = stage.seconds

        def report(index, metrics):
            nonlocal clock
            values = {key: float(value) for key, value in jax.device_get(metrics).items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise FloatingPointError(
                    f"train, step {index}: loss {values['loss']}, grad_norm {values['grad_norm']}, "
                    f"expected finite numbers. {checkpoints.folder} keeps the state of step "
                    f"{checkpoints.latest_step() or 0}. Lower config.train.learning_rate or "
                    "config.loss.beta, or set config.backbone.dtype=float32, in a new workdir."
                )
            values["seconds"], clock = stage.seconds - clock, stage.seconds
            writer.write(index, values)
            progress.update(spec.batch_size)

        unread = None
        for index in range(start + 1, spec.num_steps + 1):
            state, metrics = step(state, index - 1)
            if unread:
                report(*unread)  # while the step just dispatched runs
            unread = index, metrics
            stop, last = bool(held), index == spec.num_steps
            if stop or last or index % spec.save_every == 0:
                report(*unread)  # only a state that is known to be good is saved
                unread = None
                with stage.pause():
                    checkpoints.save(index, final(state) if last else state, wait=stop)
            if stop:
                break
