"""Prompts: a prompt source -> prompts.jsonl, what the model will be asked to draw in this round.

`config.prompts.source` names a file of agfsync_jax/prompt_sources; the other keys of the block go
to it. Each round gets other prompts, drawn from (config.seed, round). Where a language model writes
them, those that training never sees (`config.evaluate`) are written first, in round 0; with
--requests what it is to be asked is only written, for a batch program.
"""

import functools
from pathlib import Path

from agfsync_jax.data import records
from agfsync_jax.data.shards import repair_files
from agfsync_jax.evaluation.prompts import held_out_block, held_out_folder
from agfsync_jax.llm.asking import Waiting
from agfsync_jax.prompt_sources import Desk, draw_prompts, takes_long
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.utils.files import to_path


def write_prompts(job: Job) -> None:
    """Writes prompts.jsonl, and in round 0 that of held-out prompts which are made as they are.

    Raises:
        ValueError: the source cannot give that many prompts.
    """
    config, waiting = job.config, False
    for path in job.files:
        if path not in job.missing:
            continue
        of_training = path.parent == job.folder
        spec = config.prompts.to_dict() if of_training else held_out_block(config)
        draw = functools.partial(draw_prompts, spec, seed=config.seed)
        desk = Desk(path.with_name(f"prompts.{spec['source']}"), job.stage, job.requests)
        if takes_long(spec, "prompts"):
            desk.apart = _known(job, of_training)
        try:
            rows = draw(round_index=job.round_index if of_training else 0, desk=desk)
        except Waiting as told:
            job.stage.print(str(told))
            waiting = True
        if waiting:  # training's are made apart from those that are held out
            continue
        records.write_jsonl(path, rows)
        job.stage.items += len(rows)


def _known(job: Job, of_training: bool) -> dict[str, str]:
    """Prompts that new ones must be apart from, and what they are."""
    held = held_out_folder(to_path(job.workdir)) / "prompts.jsonl"
    files = {held: "held-out prompts"} if of_training else {}
    if not of_training and not takes_long(job.config.prompts.to_dict(), "prompts"):
        files[job.folder / "prompts.jsonl"] = "training's prompts"
    files |= {job.folder_of(i) / "prompts.jsonl": f"round {i}" for i in range(job.round_index)}
    return {
        row["prompt"]: of
        for path, of in files.items()
        if path.exists()
        for row in records.read_jsonl(path)
    }


def files(job: Job) -> list[Path]:
    """Held-out prompts first: training's are then made apart from them."""
    own = job.folder / "prompts.jsonl"
    held = held_out_folder(job.workdir) / "prompts.jsonl"
    if job.round_index or not takes_long(held_out_block(job.config), "prompts"):
        return [own]
    return [held, own] if takes_long(job.config.prompts.to_dict(), "prompts") else [own, held]


main = Step(
    "prompts",
    write_prompts,
    outputs=tuple(
        f"{place}prompts.{end}" for place in ("", "heldout/") for end in ("jsonl", "llm")
    ),
    settings=("seed", "prompts"),
    files=files,
    repair=lambda job: repair_files(job.files),
    main_only=True,
    unit="prompts",
)
