"""Evaluate: base and tuned model draw held-out prompts from the same seeds; who scores higher?

The base is the model that the first round started from, the tuned one this round's checkpoint.
Every scorer of the config and the evaluators of `config.evaluate` judge both. evals/ gets each
image's scores and answers, each model's means (base.json, tuned.json) and the paired difference and
win rate (comparison.json), all with 95% bootstrap intervals over prompts.

The base is drawn once, in round 0, and serves every later round.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from agfsync_jax import backbones, evaluators, scorers
from agfsync_jax.data import images as png
from agfsync_jax.data import records
from agfsync_jax.data.candidates import draw_candidates
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training.checkpoints import restore_denoiser
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import to_path


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


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Fills round_NNN/evals/, and round_000/evals/ with the base model's part.

    Raises:
        FileNotFoundError: no checkpoint in this round.
        RecordError: a damaged shard; `repair` drops it first.
        ValueError: prompts or scores that do not allow a comparison.
    """
    workdir = to_path(workdir)
    round_dir = workdir / f"round_{round_index:03d}"
    folders = {"base": workdir / "round_000" / "evals", "tuned": round_dir / "evals"}
    prompts, questions = evaluators.held_out(config)
    plan = {name: shards(config, prompts, folder, name) for name, folder in folders.items()}
    every = plan["base"] + plan["tuned"]
    if repair and multihost.is_main():
        _repair(every)
    multihost.barrier("evaluate repair")

    mine = [shard for shards in plan.values() for shard in _of_process(shards)]
    undrawn = {shard.images for shard in mine if not shard.images.exists()}
    unscored = [shard for shard in mine if not shard.scores.exists()]
    drawing = any(not shard.images.exists() for shard in every)
    multihost.barrier("evaluate plan")
    with Stage(round_dir, "evaluate") as stage:
        stage.skipped(len(mine) - len(undrawn), len(mine))
        if drawing:  # the processes draw together, those without work too
            _draw(config, round_dir / "checkpoints", mine, undrawn, prompts, stage)
        if unscored:
            _score(config, unscored, prompts, questions, stage)
        multihost.barrier("evaluate scores")
        if multihost.is_main():
            for folder in dict.fromkeys(folders.values()):
                records.write_jsonl(folder / "prompts.jsonl", prompts.values())
                records.write_jsonl(
                    folder / "questions.jsonl", itertools.chain(*questions.values())
                )
            _conclude(plan, folders["tuned"])
    multihost.barrier("evaluate")


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


def _repair(every: list[Shard]) -> None:
    """Drops damaged files; scores without their answers go too, as they say that all is there."""
    for shard in every:
        for path in (shard.images, shard.scores, shard.answers):
            if path.exists() and records.repair_shard(path) and path == shard.answers:
                shard.scores.unlink(missing_ok=True)


def _of_process(found: Sequence[Shard]) -> list[Shard]:
    return [found[index] for index in multihost.shards_of_process(len(found))]


def _draw(
    config,
    checkpoints: Path,
    mine: list[Shard],
    undrawn: set[Path],
    prompts: dict[str, dict],
    stage: Stage,
) -> None:
    """Draws the undrawn shards, unperturbed, with the sampler's settings of `config.sample`."""
    mesh = create_mesh(config.mesh)
    backbone = backbones.load(config, mesh, param_dtype=config.sample.param_dtype)
    name = backbone.denoiser_name
    tuned = restore_denoiser(checkpoints, backbone.params[name], config.train.num_steps)
    params = {"base": backbone.params, "tuned": backbone.params | {name: tuned}}
    generator = backbones.generator(config, mesh, backbone, conditioning_noise=0.0)
    texts = {key: row["prompt"] for key, row in prompts.items()}
    size = sum(len(shard.rows) for shard in mine if shard.images in undrawn)
    with stage.progress(size) as progress:
        for model, weights in params.items():
            found = [(shard.images, shard.rows) for shard in mine if shard.model == model]
            for count in draw_candidates(
                generator, weights, found, undrawn, texts, config.evaluate.num_seeds
            ):
                progress.update(count)


def _score(config, unscored: list[Shard], prompts, questions, stage: Stage) -> None:
    """Writes scores and answers beside each shard of images."""
    texts = {key: row["prompt"] for key, row in prompts.items()}
    size = config.score.batch_size
    judges = evaluators.load_evaluators(config.evaluate.evaluators)
    models = scorers.load_scorers(
        scorers.local_mesh(config.score.mesh), config.scorers.to_dict(), batch_size=size
    )
    by_path = {shard.images: shard for shard in unscored}
    drawn = stage.items
    with stage.progress(sum(len(shard.rows) for shard in unscored), "scores") as progress:
        for path, rows, answers, _ in scorers.score_shards(
            models, list(by_path), texts, questions, batch_size=size, scored=progress.update
        ):
            fields = records.read_shard(path, records.CANDIDATE_FEATURES, ["image"])
            images = png.decode_pngs([row["image"] for row in fields])
            evaluators.judge(judges, images, rows, texts, questions)
            if answers:
                records.write_parquet(by_path[path].answers, answers)
            records.write_parquet(by_path[path].scores, rows)
    stage.items = drawn  # an image counts once


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
