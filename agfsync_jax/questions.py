"""Questions: prompts -> questions.jsonl, what the images will be asked, in TIFA's fields.

`config.questions.source` names a file of agfsync_jax/prompt_sources; the other keys of the block
go to it. Where no scorer of the config asks questions there is nothing to do.
"""

from pathlib import Path

from agfsync_jax import scorers
from agfsync_jax.data import records
from agfsync_jax.data.shards import read_rows
from agfsync_jax.parallel import multihost
from agfsync_jax.utils import modules
from agfsync_jax.utils.clock import Stage
from agfsync_jax.utils.files import to_path

FIELDS = ("id", "caption", "question", "choices", "answer", "element_type", "element")


def main(config, workdir: Path, *, round_index: int = 0, repair: bool = False) -> None:
    """Writes round_NNN/questions.jsonl, unless it is there.

    Raises:
        FileNotFoundError: no prompts.jsonl.
        ValueError: the source does not exist, gives a bad row, or leaves a prompt without one.
    """
    del repair  # one small file, whole or absent
    round_dir = to_path(workdir) / f"round_{round_index:03d}"
    path = round_dir / "questions.jsonl"
    if multihost.is_main():
        with Stage(round_dir, "questions", unit="questions") as stage:
            if path.exists():
                stage.skipped(1, 1, "files")
            elif not scorers.asks_questions(config.scorers):
                stage.print("no scorer of this config asks any")
            else:
                rows = ask(config, read_rows(round_dir / "prompts.jsonl", "prompts"))
                records.write_jsonl(path, rows)
                stage.items += len(rows)
    multihost.barrier("questions")


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
