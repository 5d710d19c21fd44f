"""Questions: prompts -> questions.jsonl, what the images will be asked, in TIFA's fields.

`config.questions.source` names a file of agfsync_jax/prompt_sources; the other keys of the block
go to it. Where no scorer of the config asks questions there is nothing to do.
"""

from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows, repair_files
from agfsync_jax.prompt_sources import ask_questions
from agfsync_jax.scoring.columns import asks_questions
from agfsync_jax.steps.runner import Job, Step


def write_questions(job: Job) -> None:
    """Writes questions.jsonl.

    Raises:
        FileNotFoundError: no prompts.jsonl.
        ValueError: a bad row, or a prompt without a question.
    """
    if not asks_questions(job.config.scorers):
        job.stage.print("no scorer of this config asks any")
        return
    spec, seed = job.config.questions.to_dict(), job.config.seed
    prompt_rows = read_rows(job.folder / "prompts.jsonl", "prompts")
    rows = ask_questions(spec, prompt_rows, seed=seed)
    records.write_jsonl(job.folder / "questions.jsonl", rows)
    job.stage.items += len(rows)


main = Step(
    "questions",
    write_questions,
    outputs=("questions.jsonl",),
    settings=("questions",),
    files=lambda job: [job.folder / "questions.jsonl"],
    repair=lambda job: repair_files(job.files),
    main_only=True,
    unit="questions",
)
