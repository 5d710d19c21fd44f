"""Prompts: a prompt source -> prompts.jsonl, what the model will be asked to draw in this job.

`config.prompts.source` names a file of agfsync_jax/prompt_sources; the other keys of the block go
to it. Each round gets other prompts, drawn from (config.seed, round).
"""

from agfsync_jax.data import records
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.utils import modules

FIELDS = ("id", "prompt", "category", "source")


def write_prompts(job: Job) -> None:
    """Writes prompts.jsonl; ValueError where the source cannot give that many prompts."""
    rows = draw(job.config, job.round_index)
    records.write_jsonl(job.folder / "prompts.jsonl", rows)
    job.stage.items += len(rows)


def draw(config, round_index: int) -> list[dict]:
    """The round's rows {id, prompt, category, source}, `num_prompts` of them, all different."""
    spec = config.prompts.to_dict()
    source = modules.load("prompt_sources", spec.pop("source"))
    rows = source.prompts(**spec, seed=config.seed, round_index=round_index)
    ids = {row["id"] for row in rows}
    if len(ids) < len(rows) or len(rows) != config.prompts.num_prompts:
        raise ValueError(
            f"prompt source {config.prompts.source!r} gave {len(rows)} rows with {len(ids)} ids:"
            f" expected {config.prompts.num_prompts} rows, each with its own id."
        )
    return [{field: row[field] for field in FIELDS} for row in rows]


main = Step(
    "prompts",
    write_prompts,
    outputs=("prompts.jsonl",),
    settings=("seed", "prompts"),
    files=lambda job: [job.folder / "prompts.jsonl"],
    main_only=True,
    unit="prompts",
)
