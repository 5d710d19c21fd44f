"""Questions: prompts -> questions.jsonl, what the images will be asked, in TIFA's fields.

`config.questions.source` names a file of agfsync_jax/prompt_sources; the other keys of the block
go to it. Where no scorer of the config asks questions there is nothing to do.
"""

from agfsync_jax import scorers
from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows
from agfsync_jax.steps.runner import Job, Step
from agfsync_jax.utils import modules

FIELDS = ("id", "caption", "question", "choices", "answer", "element_type", "element")


def write_questions(job: Job) -> None:
    """Writes questions.jsonl.

    Raises:
        FileNotFoundError: no prompts.jsonl.
        ValueError: a bad row, or a prompt without a question.
    """
    if not scorers.asks_questions(job.config.scorers):
        job.stage.print("no scorer of this config asks any")
        return
    rows = ask(job.config, read_rows(job.folder / "prompts.jsonl", "prompts"))
    records.write_jsonl(job.folder / "questions.jsonl", rows)
    job.stage.items += len(rows)


def ask(config, prompt_rows: list[dict]) -> list[dict]:
    """The questions of the prompts, one row a question, each under its prompt's id."""
    spec = config.questions.to_dict()
    source = modules.load("prompt_sources", spec.pop("source"))
    rows = source.questions(prompt_rows, **spec, seed=config.seed)
    for row in rows:
        if row["answer"] not in row["choices"]:
            raise ValueError(
                f"question {row['question']!r} of {row['id']}: the answer {row['answer']!r} is not"
                f" among its choices {row['choices']}."
            )
    scorers.check_questions(prompt_rows, rows)
    return [{field: row[field] for field in FIELDS} for row in rows]


main = Step(
    "questions",
    write_questions,
    outputs=("questions.jsonl",),
    settings=("questions",),
    files=lambda job: [job.folder / "questions.jsonl"],
    main_only=True,
    unit="questions",
)
