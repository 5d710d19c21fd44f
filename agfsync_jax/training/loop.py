"""The loop over steps: metrics, validations and checkpoints of a training."""

import dataclasses
import math
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from agfsync_jax.data.embeddings import PromptEmbeddings
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.loader import PairLoader
from agfsync_jax.data.records import write_file
from agfsync_jax.models import lora
from agfsync_jax.parallel import multihost
from agfsync_jax.training import program
from agfsync_jax.training.checkpoints import Checkpoints
from agfsync_jax.training.objective import NUM_BINS
from agfsync_jax.training.step import StepSpec, TrainState
from agfsync_jax.training.symptoms import Symptoms
from agfsync_jax.training.validation import HeldOutPairs, Validation
from agfsync_jax.utils import flops
from agfsync_jax.utils.clock import Progress, Stage
from agfsync_jax.utils.metrics import MetricWriter, read_metrics
from agfsync_jax.utils.signals import hold_signals

_NOISE = 0.05  # of margins; larger roundings are told


@dataclasses.dataclass(frozen=True)
class Training:
    """A training that is ready to go on."""

    spec: StepSpec
    state: TrainState  #: where it goes on; the first step takes its memory
    frozen: Mapping[str, Any]  #: what no step changes, see `train_step`
    compiled_step: Callable  #: see `step_program`
    loader: PairLoader
    embeddings: PromptEmbeddings | None = None  #: of the loader's rows; None where steps make them
    validation: Validation | None = None  #: None where nothing is drawn
    held_out: HeldOutPairs | None = None  #: None where no pair is
    higher_is_better: bool = True  #: of the metric `config.train.best`
    load_base: Callable[[], Any] | None = None  #: what the denoiser was where training started

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Array]]:
        """The state after step `index`, from 0, and its metrics; takes the state's memory."""
        return self.compiled_step(state, self.frozen, self.batch(index))

    def batch(self, index: int) -> dict[str, Any]:
        """What step `index` learns from."""
        return conditioned(self.loader, self.embeddings, index)

    def networks(self, state: TrainState) -> dict[str, Any]:
        """The parameters that a state has come to, to compute with: of each network trained."""
        spec, made = self.spec, state.averaged
        name = spec.backbone.denoiser_name
        if not spec.lora_rank:
            return {name: made}
        found = {name: lora.attach(self.frozen["base"], lora.of_network(made))}
        for network, own in self.frozen["text"].items() if spec.lora_text_encoder else ():
            found[network] = lora.attach(own, lora.of_network(made, network))
        return found

    def result(self, state: TrainState) -> Any:
        """What the last checkpoint holds: other verbs read a whole denoiser, named "params".

        `restore_state` goes on from it.
        """
        if self.spec.lora_rank:
            made = {"params": self.merged(state.averaged), "adapters": state.averaged}
        elif state.ema is None:
            return state
        else:
            made = {"params": state.ema}
        return made | {"state": state._replace(ema=None)}

    def merged(self, adapters: lora.Adapters) -> Any:
        """The denoiser, as it is in its files and not as steps read it, with its adapters added."""
        base, adapters = self.load_base(), lora.of_network(adapters)
        places = jax.tree.map(lambda leaf: leaf.sharding, base)
        return jax.jit(lora.merge, donate_argnums=0, out_shardings=places)(base, adapters)

    def step_flops(self, index: int) -> int:
        """FLOP of step `index` by formula, on all devices."""
        spec = self.spec
        denoiser = jax.eval_shape(self.networks, self.state)[spec.backbone.denoiser_name]
        return program.step_flops(spec, denoiser, self.batch(index), self.frozen["text"])


def conditioned(
    loader: PairLoader,
    embeddings: PromptEmbeddings | None,
    index: int = 0,
    *,
    examples: np.ndarray | None = None,
) -> dict[str, Any]:
    """A loader's batch, or these examples, with their prompts' embeddings if there are any."""
    batch = loader.batch(index) if examples is None else loader.examples(examples)
    if embeddings:
        del batch["token_ids"]
        prompts = loader.prompt_rows(index) if examples is None else examples
        batch["conditioning"] = embeddings(prompts)
    return batch


def restore_state(checkpoints: Checkpoints, step: int, abstract: TrainState) -> TrainState:
    """The state at a step, also where a training with fewer steps has ended: see `result`."""
    leaves = checkpoints.leaves(step)
    if "state.step" not in leaves:
        return checkpoints.restore(step, abstract)
    tree = {"state": abstract._replace(ema=None)}
    if abstract.ema is not None:
        made = "adapters" if any(name.startswith("adapters.") for name in leaves) else "params"
        tree[made] = abstract.ema
    found = checkpoints.restore(step, tree)
    return found.pop("state")._replace(ema=next(iter(found.values()), None))


def fit(spec: Any, training: Training, start: int, stage: Stage, checkpoints: Checkpoints) -> None:
    """Takes the steps from `start` to the end of `spec`, `config.train`, and saves what they make.

    A signal saves the step under way and is raised then.

    Raises:
        FloatingPointError: a loss or gradient that is not finite; names the step.
    """
    folder = checkpoints.folder
    with (
        MetricWriter(
            folder / "metrics.jsonl",
            start,
            multihost.is_main(),
            tensorboard=folder / "tensorboard" if spec.tensorboard else None,
            wandb=spec.wandb,
        ) as writer,
        stage.progress((spec.num_steps - start) * spec.batch_size) as progress,
        hold_signals(signal.SIGINT, signal.SIGTERM) as held,
    ):
        _Loop(spec, training, stage, checkpoints, writer, progress).run(start, held)


@dataclasses.dataclass
class _Loop:
    """Devices never wait: the metrics of a step are read when the next one is dispatched."""

    spec: Any
    training: Training
    stage: Stage
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress

    def __post_init__(self):
        self.peak = flops.peak(jax.devices()[0].device_kind)  # None where it is not known
        self.step_flops: dict[tuple[int, ...], int] = {}  # by the latents' shape
        self.unread: tuple[int, Mapping[str, Array]] | None = None
        self.clock = self.stage.seconds  # when the last metrics were read
        self.best = self.checkpoints.best() if self.spec.best else None  # (step, value)
        self.symptoms = Symptoms()
        for row in read_metrics(self.writer.path) if multihost.is_main() else ():
            self.symptoms.see(row)  # what has been told is not told again

    def run(self, start: int, held: Sequence[int]) -> None:
        """Steps until the last one, or the one in which a signal is held."""
        spec, state, stop_together = self.spec, self.training.state, multihost.StopTogether()
        for step in range(start + 1, spec.num_steps + 1):
            state, metrics = self.step(state, step - 1)
            self.report()  # the step before, while the one just dispatched runs
            self.unread, scores = (step, metrics), None
            stop, last = stop_together(step, bool(held)), step == spec.num_steps
            due = spec.validate_every and (last or step % spec.validate_every == 0)
            if due and not stop:
                jax.block_until_ready(metrics)  # else its time would count as the validation's
                scores = self.validate(step, state)
            better = bool(scores and spec.best) and self.is_better(step, scores[spec.best])
            early = bool(scores) and not last and self.is_settled(step)
            save = stop or last or early or better or step % spec.save_every == 0
            if save or scores:
                self.report(scores)  # only a state that is known to be good is saved
            if save:
                with self.stage.pause():
                    self.writer.flush()
                    kept = self.training.result(state) if last or early else state
                    self.checkpoints.save(step, kept, wait=stop or early, metrics=scores)
            if early:
                self.end_early(step)
                break
            if stop and not last:
                if not held:  # another process was told to
                    raise KeyboardInterrupt("SIGTERM")
                break

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Array]]:
        """Step `index`, which is compiled where its shape is new; the estimate leaves that out."""
        shape, began = self.training.loader.shape(index), self.stage.seconds
        if shape in self.step_flops:
            return self.training.step(state, index)
        self.step_flops[shape] = self.training.step_flops(index) if self.peak else 0
        taken = self.training.step(state, index)
        self.progress.leave_out(self.stage.seconds - began)
        return taken

    def is_better(self, step: int, value: float) -> bool:
        """Whether a validation's value is the best so far, which is kept in mind."""
        sign = 1 if self.training.higher_is_better else -1
        if not math.isfinite(value) or (self.best and sign * value <= sign * self.best[1]):
            return False
        self.best = step, value
        return True

    def is_settled(self, step: int) -> bool:
        """Whether `patience` validations have brought nothing better."""
        spec = self.spec
        return bool(spec.patience and self.best) and (
            step - self.best[0] >= spec.patience * spec.validate_every
        )

    def end_early(self, step: int) -> None:
        """Says that the training is over."""
        if multihost.is_main():
            self.checkpoints.end()
        number, value = self.best
        self.stage.print(
            f"ended at step {step} of {self.spec.num_steps}: no better {self.spec.best} than"
            f" {value:.4g}, that of step {number}, in {self.spec.patience} validations;"
            " --step=best takes that one"
        )

    def validate(self, step: int, state: TrainState) -> dict[str, float]:
        """Scores of held-out prompts and of held-out pairs; the pictures go to TensorBoard and to a
        file."""
        training, scores, grid = self.training, {}, None
        with self.stage.pause():
            if training.validation:
                scores, grid = training.validation(training.networks(state))
            if training.held_out:
                scores |= training.held_out(state, training.frozen)
            if grid is not None:
                self.writer.write_image(step, "validation", grid)
                if multihost.is_main():
                    path = self.checkpoints.folder / "validation" / f"{step:06d}.png"
                    write_file(path, [encode_png(grid)])
            listed = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.stage.print(f"step {step}, validation: {listed}")
        return scores

    def report(self, scores: Mapping[str, float] | None = None) -> None:
        """Writes the metrics that are unread, if any, with a validation's scores.

        Raises FloatingPointError for a loss or gradient that is not finite.
        """
        if self.unread is None:
            return
        (step, metrics), self.unread = self.unread, None
        values = as_numbers(jax.device_get(metrics))
        if step == 1 and (noise := values.get("rewards/margin_size", 0.0)) > _NOISE:
            self.stage.print(
                f"margins of {noise:.2g} where policy and reference are still equal: roundings of"
                " config.backbone.dtype, and early steps learn from them, too"
            )
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"train, step {step}: loss {values['loss']}, grad_norm {values['grad_norm']}, "
                f"expected finite numbers. {self.checkpoints.folder} keeps the state of step "
                f"{self.checkpoints.latest_step() or 0}. Lower config.train.learning_rate or "
                "the loss's beta, or set config.backbone.dtype=float32, in a new workdir."
            )
        now = self.stage.seconds
        values["seconds"], self.clock = now - self.clock, now
        note = f"loss {values['loss']:.4g}"
        if self.peak:
            speed = self.step_flops[self.training.loader.shape(step - 1)] / values["seconds"]
            values["mfu"] = speed / self.peak / jax.device_count()
            note += f", MFU {values['mfu']:.0%}"
        if told := self.symptoms.see(values):
            self.stage.print(f"step {step}: {told}")
        note += ", saturated" if self.symptoms.is_saturated else ""
        values |= {f"validation/{name}": value for name, value in (scores or {}).items()}
        self.writer.write(step, values)
        self.progress.update(self.spec.batch_size, note=note)


def as_numbers(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """A step's metrics; the errors by time as means, of those timesteps that were drawn."""
    metrics = dict(metrics)
    sums, counts = metrics.pop("error_by_time"), metrics.pop("count_by_time")
    values = {key: float(value) for key, value in metrics.items()}
    for index in np.flatnonzero(counts):
        low, high = (100 * i // NUM_BINS for i in (index, index + 1))
        values[f"error_by_time/{low:02d}-{high}%"] = float(sums[index] / counts[index])
    return values
