"""Evaluate: base and tuned model draw held-out prompts from the same seeds; who scores higher?

The base is the model that the first round started from, the tuned one this round's checkpoint.
Every scorer of the config and the evaluators of `config.evaluate` judge both. evals/ gets each
image's scores and answers, each model's means (base.json, tuned.json) and the paired difference and
win rate (comparison.json), all with 95% bootstrap intervals over prompts.

The base is drawn once, in round 0, and serves every later round.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import jax

from agfsync_jax import backbones
from agfsync_jax.data import records
from agfsync_jax.data.candidates import Shard, largest_batch
from agfsync_jax.data.scores import repair_scores, scored_round
from agfsync_jax.evaluation.comparison import conclude
from agfsync_jax.evaluation.drawing import draw_images, plan_images
from agfsync_jax.evaluation.judging import judge_shards, judged_path
from agfsync_jax.evaluation.prompts import check_apart, check_frozen, freeze, held_out
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.steps.runner import Job, Step, of_process
from agfsync_jax.training.checkpoints import as_read, restore_trained, trained_rounds


class Plan(NamedTuple):
    """What is drawn and judged: rows of prompts and of questions by prompt id, shards by model; and
    what the tuned one is, see `restore_trained`."""

    prompts: dict[str, dict]
    questions: dict[str, list[dict]]
    shards: dict[str, list[Shard]]
    trained: list[tuple[Path, int]]

    @property
    def texts(self) -> dict[str, str]:
        """Prompt id -> text."""
        return {key: row["prompt"] for key, row in self.prompts.items()}

    @property
    def images(self) -> list[Path]:
        """The shards of both models."""
        return [shard.path for found in self.shards.values() for shard in found]


def plan(job: Job) -> Plan:
    """The held-out prompts and the images of both models.

    Raises:
        ValueError: prompts that cannot be, are training's, or are others than those that images
            are there of.
        RecordError: those are damaged, unless they are to be made anew.
    """
    prompts, questions = held_out(job.config, job.workdir)
    own = [job.folder_of(index) for index in range(job.round_index + 1)]
    folders = {*own, scored_round(job.config.pair.path, job.folder)} - {None}
    drawn = (folder / "prompts.jsonl" for folder in folders)
    trained = itertools.chain(*(records.read_jsonl(path) for path in drawn if path.exists()))
    check_apart([row["prompt"] for row in prompts.values()], (row["prompt"] for row in trained))
    for folder in dict.fromkeys(_folders(job).values()):
        try:
            check_frozen(folder, prompts, questions)
        except records.RecordError:
            if not job.repair:
                raise
    shards = {
        model: plan_images(job.config, list(prompts), evals / model)
        for model, evals in _folders(job).items()
    }
    found = Plan(prompts, questions, shards, [])
    try:
        trained = trained_rounds(job.workdir, job.round_index, job.config, job.step)
    except FileNotFoundError:
        if all(path.exists() for path in found.images) and not job.repair:
            job.reads = None  # nothing is left to draw
            return found
        raise
    job.reads = as_read(trained)
    return found._replace(trained=trained)


def evaluate(job: Job) -> None:
    """Draws and judges this process's shards; the processes draw together.

    Raises:
        FileNotFoundError: no checkpoint in this round.
        RecordError: a damaged shard.
    """
    plan = job.plan
    if multihost.is_main():
        for folder in dict.fromkeys(_folders(job).values()):
            freeze(folder, plan.prompts, plan.questions)
    mine = {model: of_process(shards) for model, shards in plan.shards.items()}
    if not job.missing.isdisjoint(plan.images):
        _draw(job, mine)
    own = itertools.chain(*mine.values())
    if unjudged := [shard for shard in own if judged_path(shard.path) in job.missing]:
        judge_shards(job.config, unjudged, plan.texts, plan.questions, job.stage)


def _draw(job: Job, shards: dict[str, list[Shard]]) -> None:
    """Draws what is missing; the two models share all networks that are not trained."""
    config = backbones.as_judged(job.config)
    mesh = create_mesh(config.mesh)
    backbone = backbones.load(config, mesh, param_dtype=config.sample.param_dtype)
    tuned = restore_trained(job.plan.trained, backbone.params, backbone.denoiser_name)
    params = {"base": backbone.params, "tuned": tuned}
    num_images = largest_batch(job.plan.shards["base"], jax.process_count())
    draw_images(
        *(config, mesh, backbone, params, shards, job.missing, job.plan.texts, job.stage),
        num_images=num_images,
    )


def summarize(job: Job) -> None:
    """Gathers the shards' tables and compares them; ValueError where no image has scores."""
    for metric, count in conclude(job.plan.shards, job.folder / "evals").items():
        job.stage.print(f"{metric}: {count} images have no finite score of both models: left out")


def repair(job: Job) -> None:
    """Drops damaged files; scores without their answers go too, as they say that all is there."""
    for path, rows in of_process([*itertools.chain(*job.plan.shards.values())]):
        repair_scores(path, judged_path(path), len(rows))
    if multihost.is_main():
        for folder in {path.parents[1] for path in job.plan.images if path.exists()}:
            freeze(folder, job.plan.prompts, job.plan.questions)


def _folders(job: Job) -> dict[str, Path]:
    return {"base": job.folder_of(0) / "evals", "tuned": job.folder / "evals"}


main = Step(
    "evaluate",
    evaluate,
    outputs=("evals",),
    settings=("evaluate",),
    plan=plan,
    files=lambda job: [file for path in job.plan.images for file in (path, judged_path(path))],
    finish=summarize,
    repair=repair,
)
