"""Evaluate: base and tuned model draw held-out prompts from the same seeds; who scores higher?

The base is the model that the first round started from, the tuned one this round's checkpoint.
Every scorer of the config and the evaluators of `config.evaluate` judge both. evals/ gets each
image's scores and answers, each model's means (base.json, tuned.json) and the paired difference and
win rate (comparison.json), all with 95% bootstrap intervals over prompts.

The base is drawn once, in round 0, and serves every later round.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

from agfsync_jax import backbones, evaluators, scorers
from agfsync_jax.data import images as png
from agfsync_jax.data import records
from agfsync_jax.data.candidates import draw_candidates
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.steps.runner import Job, Step, of_process
from agfsync_jax.training.checkpoints import restore_denoiser


class Shard(NamedTuple):
    """Some images of one model: where they lie, and which they are."""

    model: str  # base or tuned
    images: Path
    rows: list[dict]  # prompt_id, candidate (the index of the seed), seed

    @property
    def scores(self) -> Path:
        return self.images.with_suffix(".parquet")

    @property
    def answers(self) -> Path:
        return self.images.with_name(f"answers-{self.images.stem}.parquet")


class Plan(NamedTuple):
    """What is drawn and judged: rows of prompts and of questions by prompt id, shards by model."""

    prompts: dict[str, dict]
    questions: dict[str, list[dict]]
    shards: dict[str, list[Shard]]

    @property
    def texts(self) -> dict[str, str]:
        """Prompt id -> text."""
        return {key: row["prompt"] for key, row in self.prompts.items()}


def plan(job: Job) -> Plan:
    """The held-out prompts and the images of both models; ValueError for prompts that cannot be."""
    prompts, questions = evaluators.held_out(job.config)
    found = {name: shards(job.config, prompts, at, name) for name, at in _folders(job).items()}
    return Plan(prompts, questions, found)


def evaluate(job: Job) -> None:
    """Draws and scores this process's shards; the processes draw together.

    Raises:
        FileNotFoundError: no checkpoint in this round.
        RecordError: a damaged shard.
    """
    mine = [shard for found in job.plan.shards.values() for shard in of_process(found)]
    if any(shard.images in job.missing for found in job.plan.shards.values() for shard in found):
        _draw(job, mine)
    if unscored := [shard for shard in mine if shard.scores in job.missing]:
        _score(job, unscored)


def conclude(job: Job) -> None:
    """Writes what was asked, gathers the shards' tables and compares them.

    Raises:
        ValueError: scores that do not allow a comparison.
    """
    prompts, questions, plan = job.plan
    for folder in dict.fromkeys(_folders(job).values()):
        records.write_jsonl(folder / "prompts.jsonl", prompts.values())
        records.write_jsonl(folder / "questions.jsonl", itertools.chain(*questions.values()))
    _conclude(plan, job.folder / "evals")


def repair(job: Job) -> None:
    """Drops damaged files; scores without their answers go too, as they say that all is there."""
    for shard in itertools.chain(*job.plan.shards.values()):
        for path in (shard.images, shard.scores, shard.answers):
            if path.exists() and records.repair_shard(path) and path == shard.answers:
                shard.scores.unlink(missing_ok=True)


def _folders(job: Job) -> dict[str, Path]:
    return {"base": job.folder_of(0) / "evals", "tuned": job.folder / "evals"}


def shards(config, prompts: dict[str, dict], folder: Path, model: str) -> list[Shard]:
    """All shards of a model's images in an evals folder, `num_seeds` images a prompt."""
    ids, size = list(prompts), config.sample.prompts_per_shard
    count = -(-len(ids) // size)
    return [
        Shard(
            model,
            folder / model / f"{records.shard_name(index, count)}.tfrecord",
            [
                {"prompt_id": i, "candidate": c, "seed": row_seed(config.seed, 0, i, c)}
                for i in ids[index * size : (index + 1) * size]
                for c in range(config.evaluate.num_seeds)
            ],
        )
        for index in range(count)
    ]


def _draw(job: Job, mine: list[Shard]) -> None:
    """Draws what is missing, unperturbed, with the sampler's settings of `config.sample`."""
    config = job.config
    mesh = create_mesh(config.mesh)
    backbone = backbones.load(config, mesh, param_dtype=config.sample.param_dtype)
    name = backbone.denoiser_name
    checkpoints = job.folder / "checkpoints"
    tuned = restore_denoiser(checkpoints, backbone.params[name], config.train.num_steps)
    params = {"base": backbone.params, "tuned": backbone.params | {name: tuned}}
    generator = backbones.generator(config, mesh, backbone, conditioning_noise=0.0)
    size = sum(len(shard.rows) for shard in mine if shard.images in job.missing)
    undrawn = job.missing.intersection(shard.images for shard in mine)
    with job.stage.progress(size) as progress:
        for model, weights in params.items():
            found = [(shard.images, shard.rows) for shard in mine if shard.model == model]
            for count in draw_candidates(
                generator, weights, found, undrawn, job.plan.texts, config.evaluate.num_seeds
            ):
                progress.update(count)


def _score(job: Job, unscored: list[Shard]) -> None:
    """Writes scores and answers beside each shard of images."""
    config, texts, questions = job.config, job.plan.texts, job.plan.questions
    size = config.score.batch_size
    judges = evaluators.load_evaluators(config.evaluate.evaluators)
    models = scorers.load_scorers(
        scorers.local_mesh(config.score.mesh), config.scorers.to_dict(), batch_size=size
    )
    by_path = {shard.images: shard for shard in unscored}
    drawn = job.stage.items
    with job.stage.progress(sum(len(shard.rows) for shard in unscored), "scores") as progress:
        for path, rows, answers, _ in scorers.score_shards(
            models, list(by_path), texts, questions, batch_size=size, scored=progress.update
        ):
            fields = records.read_shard(path, records.CANDIDATE_FEATURES, ["image"])
            images = png.decode_pngs([row["image"] for row in fields])
            evaluators.judge(judges, images, rows, texts, questions)
            if answers:
                records.write_parquet(by_path[path].answers, answers)
            records.write_parquet(by_path[path].scores, rows)
    job.stage.items = drawn  # an image counts once


def _conclude(plan: dict[str, list[Shard]], evals: Path) -> None:
    """Gathers the shards' tables and writes means, differences and win rates."""
    tables = {}
    for model, found in plan.items():
        tables[model] = [row for s in found for row in records.read_parquet(s.scores)]
        records.write_parquet(evals / f"{model}-rows.parquet", tables[model])
        if answers := [
            r for s in found if s.answers.exists() for r in records.read_parquet(s.answers)
        ]:
            records.write_parquet(evals / f"{model}-answers.parquet", answers)
    means, comparison = evaluators.compare(tables["base"], tables["tuned"])
    results = {"base": means["base"], "tuned": means["tuned"], "comparison": comparison}
    for name, result in results.items():
        records.write_file(evals / f"{name}.json", [json.dumps(result, indent=2).encode(), b"\n"])


main = Step(
    "evaluate",
    evaluate,
    outputs=("evals",),
    settings=("evaluate",),
    plan=plan,
    files=lambda job: [
        path
        for found in job.plan.shards.values()
        for shard in found
        for path in (shard.images, shard.scores)
    ],
    finish=conclude,
    repair=repair,
)
