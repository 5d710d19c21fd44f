"""Train: pairs -> checkpoints/, the denoiser tuned on a round's preference pairs.

The loss is a file of agfsync_jax/losses (`config.loss`; Diffusion-DPO by default). All of the
denoiser is trained, or LoRA adapters on its attention (`config.train.lora_rank`). Round 0 starts
from `config.backbone`, a later round from the one before; where a round starts is its reference.

Text embeddings are computed once per distinct prompt and kept in main memory, as the text encoder
is frozen; where the pairs store them (`config.pair.embeddings`), they are read instead, and with
`config.train.embeddings="step"` the step computes them. Order and noise depend on (seed, round,
step) alone: stopped and started again, on any number of devices, the training goes on as if it had
never stopped.
"""

import functools
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.data.embeddings import PromptEmbeddings
from agfsync_jax.data.loader import PairLoader, pad_rankings
from agfsync_jax.data.pairs import read_features, read_pairs, repair_pairs
from agfsync_jax.diffusion import lora
from agfsync_jax.diffusion.preference import NUM_BINS
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training import program
from agfsync_jax.training.step import TrainState, frozen_base, init_state
from agfsync_jax.utils.checkpoints import Checkpoints, restore_denoiser
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.metrics import MetricWriter
from agfsync_jax.utils.signals import hold_signals

_PAIRS = ("chosen_latents", "rejected_latents")
_RANKINGS = ("latents", "scores")


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
        Checkpoints(folders[-1] / "checkpoints", keep=config.train.keep) as checkpoints,
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


def read_data(folder: Path, is_listwise: bool, mesh: Mesh, spec: Any, seed: int) -> PairLoader:
    """The pairs of a round, or its rankings.

    Raises:
        FileNotFoundError, RecordError: no pairs, or damaged ones.
        ValueError: rankings for a loss of pairs, or pairs for one of rankings.
    """
    features = read_features(folder)
    if is_listwise != ("scores" in features):
        has, wants = ("pairs", "rankings") if is_listwise else ("rankings", "pairs")
        strategy = "'ranked'" if is_listwise else "another than 'ranked'"
        raise ValueError(
            f"{folder} holds {has}, and config.loss.name wants {wants}: run `agfsync pair` with"
            f" config.pair.strategy {strategy}, or set another loss."
        )
    stored = [n for n in features if n.startswith("embeddings/") and spec.embeddings == "cached"]
    fields = ("pair_id", "token_ids", *(_RANKINGS if is_listwise else _PAIRS))
    pairs = read_pairs(folder, fields, once=stored)
    if is_listwise:
        pairs |= pad_rankings(pairs.pop("latents"), pairs.pop("scores"))
    return PairLoader(pairs, spec.batch_size, seed, mesh, parts=spec.accumulate)


def prepare(
    config: Any, folders: list[Path], checkpoints: Checkpoints, start: int
) -> tuple[TrainState, Callable, Callable]:
    """Everything that the last round of `folders` needs to go on from step `start`.

    Returns:
        The state; step(state, index) -> (state, metrics), which takes the state's memory; and
        final(state), what the last checkpoint holds.
    """
    spec, mesh = config.train, create_mesh(config.mesh)
    cls = backbones.backbone_class(config)
    settings = program.settings_of(config, cls, len(folders) - 1)
    loader = read_data(folders[-1] / "pairs", settings.loss.is_listwise, mesh, spec, settings.seed)
    stored = loader.stored_embeddings
    name = cls.denoiser_name
    backbone = backbones.load(config, mesh, only=[name] if stored else ())
    settings = settings._replace(backbone=backbone)
    base = backbone.params.pop(name)
    if len(folders) > 1:
        base = restore_denoiser(folders[-2] / "checkpoints", base, spec.num_steps)
    embeddings = None
    if stored:
        embeddings = PromptEmbeddings(stored, loader.prompt_row, mesh)
    elif not settings.encode:
        embeddings = PromptEmbeddings.encode(backbone, loader.token_ids, spec.batch_size, mesh)
    text = {n: p for n, p in backbone.params.items() if n.startswith("text_encoder")}
    backbone.params.clear()  # the other networks have done their part

    init = functools.partial(init_state, settings=settings)
    shardings = program.state_shardings(base, settings, mesh, config.sharding)
    if start:
        abstract = jax.eval_shape(init, base)
        places = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state = checkpoints.restore(start, places)
    else:
        state = jax.jit(init, out_shardings=shardings)(base)
    frozen = {"base": None, "text": text if settings.encode else {}}
    if settings.needs_base:
        places = jax.tree.map(lambda x: x.sharding, base)
        keep = functools.partial(frozen_base, settings=settings)
        frozen["base"] = jax.jit(keep, out_shardings=places, donate_argnums=0)(base)
    del base
    compiled = program.compile_step(settings, shardings, frozen, mesh)

    def step_of(state, index):
        batch = loader.batch(index)
        if embeddings:
            del batch["token_ids"]
            batch["conditioning"] = embeddings(loader.rows(index))
        return compiled(state, frozen, batch)

    def final(state):
        """Other verbs read a whole denoiser, named "params"."""
        trained = state.params if state.ema is None else state.ema
        if spec.lora_rank:
            whole = jax.jit(lora.merge)(frozen["base"], trained)
            return {"params": whole, "adapters": trained}
        return state._replace(params=trained, ema=None)

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
            values = readable(jax.device_get(metrics))
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


def readable(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics as numbers; the errors by time as means, of those timesteps that were drawn."""
    metrics = dict(metrics)
    sums, counts = metrics.pop("error_by_time"), metrics.pop("count_by_time")
    values = {key: float(value) for key, value in metrics.items()}
    for index in np.flatnonzero(counts):
        low, high = (100 * i // NUM_BINS for i in (index, index + 1))
        values[f"error_by_time/{low:02d}-{high}%"] = float(sums[index] / counts[index])
    return values
