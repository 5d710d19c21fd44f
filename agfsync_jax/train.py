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
import json
import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from agfsync_jax import backbones
from agfsync_jax.data.embeddings import PromptEmbeddings
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.loader import PairLoader, pad_rankings
from agfsync_jax.data.pairs import read_features, read_pairs, repair_pairs
from agfsync_jax.data.records import write_file
from agfsync_jax.models import lora
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.training import program
from agfsync_jax.training.checkpoints import Checkpoints, restore_denoiser
from agfsync_jax.training.objective import NUM_BINS
from agfsync_jax.training.step import TrainState, frozen_base, init_state
from agfsync_jax.training.validation import Validation
from agfsync_jax.utils import flops
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.metrics import MetricWriter
from agfsync_jax.utils.signals import hold_signals

_PAIRS = ("chosen_latents", "rejected_latents")
_RANKINGS = ("latents", "scores")


def train(job: Job) -> None:
    """Trains to `config.train.num_steps` steps, from the round's newest checkpoint if there is one.

    Ctrl-C and SIGTERM save the step that is under way, then stop.

    Raises:
        FileNotFoundError: no pairs, or no checkpoint of the round before.
        ValueError: settings that do not fit each other, the mesh, the model or the pairs.
        FloatingPointError: a loss or gradient that is not finite; names the step.
    """
    spec = job.config.train
    folders = [job.folder_of(index) for index in range(job.round_index + 1)]
    with Checkpoints(job.folder / "checkpoints", spec.keep, spec.best) as checkpoints:
        start = checkpoints.latest_step() or 0
        job.stage.skipped(start, spec.num_steps, "steps")
        if start < spec.num_steps:
            ready = prepare(job.config, folders, checkpoints, start)
            fit(spec, ready, start, job.stage, checkpoints)


class Prepared(NamedTuple):
    """A training that is ready to go on.

    Attributes:
        state: where it is.
        step: (state, index) -> (state, metrics); takes the state's memory.
        final: state -> what the last checkpoint holds.
        validate: state -> (scores, a picture or None); None where nothing is drawn.
        flops: of a step by formula, on all devices; 0 where the devices' peak is not known.
    """

    state: TrainState
    step: Callable
    final: Callable
    validate: Callable | None = None
    flops: int = 0


def check_pairs(folder: Path, config: Any) -> None:
    """Raises ValueError for pairs that other settings of `config.pair` made."""
    path = folder / "pair.json"
    if not path.exists():
        return
    made, now = json.loads(path.read_text())["settings"], json.loads(config.pair.to_json())
    differ = [key for key in now if key != "max_bad" and made.get(key, now[key]) != now[key]]
    if differ:
        raise ValueError(
            f"{folder / 'pairs'} was made with another config.pair.{differ[0]}"
            f" ({made[differ[0]]!r}, now {now[differ[0]]!r}): run `agfsync pair` again."
        )


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


def prepare(config: Any, folders: list[Path], checkpoints: Checkpoints, start: int) -> Prepared:
    """Everything that the last round of `folders` needs to go on from step `start`."""
    spec, mesh = config.train, create_mesh(config.mesh)
    cls = backbones.backbone_class(config)
    settings = program.settings_of(config, cls, len(folders) - 1)
    check_pairs(folders[-1], config)
    loader = read_data(folders[-1] / "pairs", settings.loss.is_listwise, mesh, spec, settings.seed)
    stored = loader.stored_embeddings
    name = cls.denoiser_name
    alone = stored and not spec.validate_every  # nothing but the denoiser is wanted
    backbone = backbones.load(config, mesh, only=[name] if alone else ())
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
    validation = Validation(config, mesh, backbone) if spec.validate_every else None
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
    work = 0
    if flops.peak(jax.devices()[0].device_kind):
        shapes = jax.eval_shape(lambda base: base, base)
        conditioning = embeddings(loader.rows(0)) if embeddings else None
        work = program.step_flops(settings, shapes, loader.batch(0), conditioning)
    del base
    compiled = program.compile_step(settings, shardings, frozen, mesh)

    def step_of(state, index):
        batch = loader.batch(index)
        if embeddings:
            del batch["token_ids"]
            batch["conditioning"] = embeddings(loader.rows(index))
        return compiled(state, frozen, batch)

    def whole(state):
        trained = state.params if state.ema is None else state.ema
        return jax.jit(lora.merge)(frozen["base"], trained) if spec.lora_rank else trained

    def final(state):
        """Other verbs read a whole denoiser, named "params"."""
        if spec.lora_rank:
            trained = state.params if state.ema is None else state.ema
            return {"params": whole(state), "adapters": trained}
        return state._replace(params=whole(state), ema=None)

    validate = (lambda state: validation(whole(state))) if validation else None
    return Prepared(state, step_of, final, validate, work)


def fit(spec: Any, ready: Prepared, start: int, stage: Stage, checkpoints: Checkpoints) -> None:
    """Takes the steps from `start` to `spec.num_steps`, with metrics and checkpoints.

    A signal saves the step under way and is raised then.
    """
    board = checkpoints.folder / "tensorboard" if spec.tensorboard else None
    peak = flops.peak(jax.devices()[0].device_kind)
    with (
        MetricWriter(
            checkpoints.folder / "metrics.jsonl",
            start,
            multihost.is_main(),
            tensorboard=board,
            wandb=spec.wandb,
        ) as writer,
        stage.progress((spec.num_steps - start) * spec.batch_size) as progress,
        hold_signals(signal.SIGINT, signal.SIGTERM) as held,
    ):
        clock = stage.seconds

        def report(index, metrics, scores=None):
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
            note = f"loss {values['loss']:.4g}"
            if ready.flops:
                speed = ready.flops / values["seconds"]
                values["mfu"] = speed / peak / jax.device_count()
                note += f", MFU {values['mfu']:.0%}"
            for name, value in (scores or {}).items():
                values[f"validation/{name}"] = value
            writer.write(index, values)
            progress.update(spec.batch_size, note=note)

        state, unread, stop_together = ready.state, None, multihost.StopTogether()
        for index in range(start + 1, spec.num_steps + 1):
            state, metrics = ready.step(state, index - 1)
            if unread:
                report(*unread)  # while the step just dispatched runs
            unread, scores = (index, metrics), None
            stop, last = stop_together(index, bool(held)), index == spec.num_steps
            if ready.validate and (last or index % spec.validate_every == 0) and not stop:
                jax.block_until_ready(metrics)  # else its time would count as the validation's
                with stage.pause():
                    scores, grid = ready.validate(state)
                    if grid is not None:
                        writer.write_image(index, "validation", grid)
                        path = checkpoints.folder / "validation" / f"{index:06d}.png"
                        if multihost.is_main():
                            write_file(path, [encode_png(grid)])
                    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
                    stage.print(f"step {index}, held-out prompts: {told}")
            if stop or last or scores or index % spec.save_every == 0:
                report(*unread, scores)  # only a state that is known to be good is saved
                unread = None
            if stop or last or index % spec.save_every == 0:
                with stage.pause():
                    writer.flush()
                    kept = ready.final(state) if last else state
                    checkpoints.save(index, kept, wait=stop, metrics=scores)
            if stop and not last:
                if not held:  # another process was told to
                    raise KeyboardInterrupt("SIGTERM")
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


main = Step(
    "train",
    train,
    outputs=("checkpoints",),
    settings=("pair", "loss", "train"),
    repair=lambda job: repair_pairs(job.folder / "pairs"),
    unit="pairs",
)
