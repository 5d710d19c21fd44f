"""Prompts: a prompt source -> prompts.jsonl, what the model will be asked to draw in this round.

`config.prompts.source` names a file of agfsync_jax/prompt_sources; the other keys of the block go
to it. Each round gets other prompts, drawn from (config.seed, round).
"""

from agfsync_jax.data import records
from agfsync_jax.data.shards import repair_files
from agfsync_jax.prompt_sources import draw_prompts
from agfsync_jax.steps.runner import Job, Step


def write_prompts(job: Job) -> None:
    """Writes prompts.jsonl; ValueError where the source cannot give that many prompts."""
    spec, seed = job.config.prompts.to_dict(), job.config.seed
    rows = draw_prompts(spec, seed=seed, round_index=job.round_index)
    records.write_jsonl(job.folder / "prompts.jsonl", rows)
    job.stage.items += len(rows)


main = Step(
    "prompts",
    write_prompts,
    outputs=("prompts.jsonl",),
    settings=("seed", "prompts"),
    files=lambda job: [job.folder / "prompts.jsonl"],
    repair=lambda job: repair_files(job.files),
    main_only=True,
    unit="prompts",
)
