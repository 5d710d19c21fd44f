"""Sample: prompts -> candidates/, several images a prompt by the current policy.

Candidate 0 is drawn as it is; the others have Gaussian noise on their text embedding
(`config.sample.conditioning_noise`), so that they differ in what they show. Round 0 draws with
`config.backbone`, a later round with the denoiser that the round before trained.

A candidate depends on (config.seed, round, prompt id, candidate index) alone, not on batches or
devices. Shards of `config.sample.prompts_per_shard` prompts are whole or absent; those that are
there are not drawn again, and the others are the same bytes as if the run had not been stopped.
"""

from pathlib import Path

from agfsync_jax import backbones
from agfsync_jax.data import records
from agfsync_jax.data.candidates import draw_candidates
from agfsync_jax.diffusion.generation import row_seed
from agfsync_jax.parallel import multihost
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training.checkpoints import restore_denoiser
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import to_path

Shard = tuple[Path, list[dict]]


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Fills round_NNN/candidates/.

    Raises:
        FileNotFoundError: no prompts, no weights, or no checkpoint of the round before.
        ValueError: settings that the backbone or the mesh cannot do.
        OSError: no space left.
    """
    workdir = to_path(workdir)
    round_dir = workdir / f"round_{round_index:03d}"
    if not (round_dir / "prompts.jsonl").exists():
        raise FileNotFoundError(f"{round_dir} has no prompts.jsonl: run `agfsync prompts` first.")
    prompts = {row["id"]: row["prompt"] for row in records.read_jsonl(round_dir / "prompts.jsonl")}
    every = plan(config, list(prompts), round_dir / "candidates", round_index)
    if repair and multihost.is_main():
        for path in (path for path, _ in every if path.exists()):
            records.repair_shard(path)
    multihost.barrier("sample repair")

    mine = [every[index] for index in multihost.shards_of_process(len(every))]
    undrawn = {path for path, _ in mine if not path.exists()}
    drawing = any(not path.exists() for path, _ in every)
    multihost.barrier("sample plan")
    if drawing:
        backbones.sampler(config)  # raises before weights are read
    with Stage(round_dir, "sample") as stage:
        stage.skipped(len(mine) - len(undrawn), len(mine))
        if drawing:  # all processes draw together, those without shards of their own too
            draw(config, workdir, round_index, mine, undrawn, prompts, stage)
    multihost.barrier("sample")


def plan(config, prompt_ids: list[str], folder: Path, round_index: int) -> list[Shard]:
    """Every shard of the round, with rows {prompt_id, candidate, seed}."""
    size, count = config.sample.prompts_per_shard, config.sample.num_candidates
    if size < 1 or count < 1:
        raise ValueError(
            f"config.sample.prompts_per_shard={size} and config.sample.num_candidates={count}: "
            "expected at least 1."
        )
    num_shards = -(-len(prompt_ids) // size)
    return [
        (
            folder / f"{records.shard_name(index, num_shards)}.tfrecord",
            [
                {
                    "prompt_id": prompt_id,
                    "candidate": candidate,
                    "seed": row_seed(config.seed, round_index, prompt_id, candidate),
                }
                for prompt_id in prompt_ids[index * size : (index + 1) * size]
                for candidate in range(count)
            ],
        )
        for index in range(num_shards)
    ]


def draw(
    config,
    workdir: Path,
    round_index: int,
    shards: list[Shard],
    undrawn: set[Path],
    prompts: dict[str, str],
    stage: Stage,
) -> None:
    """Draws the undrawn of this process's shards."""
    mesh = create_mesh(config.mesh)
    backbone = backbones.load(config, mesh, param_dtype=config.sample.param_dtype)
    generator = backbones.generator(config, mesh, backbone)
    params = backbone.params
    if round_index:
        name = backbone.denoiser_name
        checkpoints = workdir / f"round_{round_index - 1:03d}" / "checkpoints"
        tuned = restore_denoiser(checkpoints, params[name], config.train.num_steps)
        params = params | {name: tuned}
    for line in backbone.describe():
        stage.print(line)
    if cut := backbone.count_truncated(list(prompts.values())):
        stage.print(f"{cut} of {len(prompts)} prompts are too long for the text encoder: cut off")
    size = sum(len(each) for path, each in shards if path in undrawn)
    with stage.progress(size) as progress:
        for count in draw_candidates(
            generator, params, shards, undrawn, prompts, config.sample.num_candidates
        ):
            progress.update(count)
