"""Questions: prompts -> questions.jsonl, what the images will be asked, in TIFA's fields.

`config.questions.source` names a file of agfsync_jax/prompt_sources; the other keys of the block
go to it. Where no scorer of the config asks questions there is nothing to do. A language model may
leave prompts without enough of them: prompts.jsonl is then written anew without these. With
--requests what it is to be asked is only written, for a batch program.
"""

from pathlib import Path

from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows, repair_files
from agfsync_jax.evaluation.prompts import held_out_folder, held_out_prompts
from agfsync_jax.llm.asking import Waiting
from agfsync_jax.prompt_sources import Desk, ask_questions, takes_long
from agfsync_jax.scoring.columns import asks_questions
from agfsync_jax.steps.runner import Job, Step


def write_questions(job: Job) -> None:
    """Writes questions.jsonl, and in round 0 that of held-out prompts where a language model asks.

    Raises:
        FileNotFoundError: no prompts.jsonl.
        ValueError: a bad row, or a prompt without a question.
    """
    config = job.config
    if not asks_questions(config.scorers):
        job.stage.print("no scorer of this config asks any")
        return
    spec = config.questions.to_dict()
    for path in job.files:
        if path not in job.missing:
            continue
        prompts = path.with_name("prompts.jsonl")
        if path.parent == job.folder or prompts.exists():
            prompt_rows = read_rows(prompts, "prompts")
        else:  # held-out prompts that a file has
            prompt_rows = held_out_prompts(config, job.workdir)
        desk = Desk(path.with_name(f"questions.{spec['source']}"), job.stage, job.requests)
        try:
            rows = ask_questions(spec, prompt_rows, seed=config.seed, desk=desk)
        except Waiting as told:
            job.stage.print(str(told))
            continue
        asked = {row["id"] for row in rows}
        kept = [row for row in prompt_rows if row["id"] in asked]
        if len(kept) < len(prompt_rows) or (path.parent != job.folder and not prompts.exists()):
            if left_out := len(prompt_rows) - len(kept):
                job.stage.print(f"{left_out} of {len(prompt_rows)} prompts have too few, and go")
            records.write_jsonl(prompts, kept)
        records.write_jsonl(path, rows)
        job.stage.items += len(rows)


def files(job: Job) -> list[Path]:
    """Of this round; in round 0 of held-out prompts, too, where a language model asks."""
    asked = asks_questions(job.config.scorers)
    long = asked and takes_long(job.config.questions.to_dict(), "questions")
    held = [held_out_folder(job.workdir) / "questions.jsonl"] * (long and not job.round_index)
    return [*held, job.folder / "questions.jsonl"]


main = Step(
    "questions",
    write_questions,
    outputs=tuple(
        f"{place}questions.{end}" for place in ("", "heldout/") for end in ("jsonl", "llm")
    ),
    settings=("questions",),
    files=files,
    repair=lambda job: repair_files(job.files),
    main_only=True,
    unit="questions",
)
