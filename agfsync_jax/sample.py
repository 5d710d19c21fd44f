"""Sample: prompts -> candidates/, several images a prompt by the current policy.

Candidate 0 is drawn as it is; the others have Gaussian noise on their text embedding
(`config.sample.conditioning_noise`), so that they differ in what they show. Job 0 draws with
`config.backbone`, a later round with the denoiser that the round before trained. LoRA files of
`config.sample.lora` are added to what draws here, and to nothing that is trained or judged.

A candidate depends on (config.seed, job, prompt id, candidate index) alone, not on batches or
devices. Shards of `config.sample.prompts_per_shard` prompts are whole or absent; those that are
there are not drawn again, and the others are the same bytes as if the run had not been stopped.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax

from agfsync_jax import backbones
from agfsync_jax.data import records
from agfsync_jax.data.candidates import Shard, draw_candidates, largest_batch, plan_shards
from agfsync_jax.data.scores import drop_incomplete, repair_images, scores_path
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.steps.runner import Job, Step, of_process
from agfsync_jax.training.checkpoints import as_read, restore_trained, trained_rounds


class Plan(NamedTuple):
    """What a round draws: {prompt id: text}, and all its shards; and what draws it, see
    `restore_trained`: nothing in round 0."""

    prompts: dict[str, str]
    shards: list[Shard]
    trained: list[tuple[Path, int]]


def plan(job: Job) -> Plan:
    """Every shard of the round; ValueError for sizes that cannot be."""
    config = job.config
    size, count = config.sample.prompts_per_shard, config.sample.num_candidates
    if size < 1 or count < 1:
        raise ValueError(
            f"config.sample.prompts_per_shard={size} and config.sample.num_candidates={count}: "
            "expected at least 1."
        )
    rows = records.read_jsonl(job.folder / "prompts.jsonl")
    prompts = {row["id"]: row["prompt"] for row in rows}
    shards = plan_shards(
        job.folder / "candidates",
        list(prompts),
        prompts_per_shard=size,
        num_candidates=count,
        seed_of=functools.partial(row_seed, config.seed, job.round_index),
    )
    trained = []
    if job.round_index:
        trained = trained_rounds(job.workdir, job.round_index - 1, config, job.step)
        job.reads = as_read(trained)
    return Plan(prompts, shards, trained)


def draw(job: Job) -> None:
    """Draws what is missing of this process's shards; all processes draw together.

    Raises:
        FileNotFoundError: no weights, or no checkpoint of the round before.
        ValueError: settings that the backbone or the mesh cannot do.
        OSError: no space left.
    """
    config = job.config
    backbones.sampler(config)  # raises before weights are read
    mesh = create_mesh(config.mesh)
    backbone = backbones.load(config, mesh, param_dtype=config.sample.param_dtype)
    num_images = largest_batch(job.plan.shards, jax.process_count())
    generator = backbones.generator(config, mesh, backbone, num_images=num_images)
    params = backbone.params
    if job.plan.trained:
        params = restore_trained(job.plan.trained, params, backbone.denoiser_name)
    if config.sample.lora:
        backbone.params = params = backbone.add_lora(params, config.sample.lora)
    for line in backbone.describe():
        job.stage.print(line)
    prompts, shards, _ = job.plan
    if cut := backbone.count_truncated(list(prompts.values())):
        job.stage.print(
            f"{cut} of {len(prompts)} prompts are too long for the text encoder: cut off"
        )
    mine = of_process(shards)
    undrawn = job.missing.intersection(path for path, _ in mine)
    with job.stage.progress(sum(len(rows) for path, rows in mine if path in undrawn)) as progress:
        for count in draw_candidates(
            generator, params, mine, undrawn, prompts, config.sample.num_candidates
        ):
            progress.update(count)


def drop_damaged(job: Job) -> None:
    """Removes damaged shards, which are then drawn anew, and scores that lack some of theirs."""
    for path, rows in of_process(job.plan.shards):
        if repair_images(path, scores_path(path), len(rows)):
            drop_incomplete(scores_path(path))


main = Step(
    "sample",
    draw,
    inputs={"prompts.jsonl": "prompts"},
    outputs=("candidates",),
    settings=("backbone", "sample"),
    plan=plan,
    files=lambda job: [path for path, _ in job.plan.shards],
    repair=drop_damaged,
)
