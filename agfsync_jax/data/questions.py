"""Rows of questions, in TIFA's fields: what they are, which can be asked, and of which prompt."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agfsync_jax.data.problems import problem

FIELDS = ("id", "caption", "question", "choices", "answer", "element_type", "element")
# A question may say, by their places in its prompt's list, on the answers of which others it
# depends (arXiv:2310.18235).
OPTIONAL = ("dependency",)

Row = Mapping[str, Any]


def fault(row: Row) -> str:
    """Why a question cannot be asked; empty where it can."""
    if missing := [field for field in FIELDS if field not in row]:
        return f"the question has no {', '.join(missing)}"
    depends = row.get("dependency", [])
    if not isinstance(depends, list) or not all(type(each) is int for each in depends):
        return f"{row['question']!r} depends on {depends!r}, which are no places of questions"
    choices = list(row["choices"])
    if not row["question"].strip():
        return "the question is empty"
    if row["answer"] not in choices or len(set(choices)) < max(2, len(choices)):
        return f"{row['question']!r} expects {row['answer']!r} of the choices {choices}"
    return ""


def only(rows: Sequence[Row], keep: Sequence[bool]) -> list[dict[str, Any]]:
    """Some of a prompt's questions; what they depend on keeps its place among those, or is gone
    with the others."""
    places = {old: new for new, old in enumerate(i for i, kept in enumerate(keep) if kept)}
    left = [dict(row) for row, kept in zip(rows, keep, strict=True) if kept]
    for row in left:
        if "dependency" in row:
            row["dependency"] = [places[each] for each in row["dependency"] if each in places]
    return left


def by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Question rows under the id of their prompt."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row.get("id")].append(row)
    return dict(grouped)


def check(prompt_rows: Sequence[Row], rows: Sequence[Row]) -> None:
    """Raises ValueError unless all questions can be asked and each prompt has one."""
    for row in rows:
        if what := fault(row):
            raise ValueError(
                f"a question of prompt {row.get('id')}: {what}; expected {', '.join(FIELDS)}, with"
                " two or more different choices and the answer among them."
            )
    asked = {row["id"] for row in rows}
    if without := [row for row in prompt_rows if row["id"] not in asked]:
        raise ValueError(
            f"{len(without)} of {len(prompt_rows)} prompts have no question, the first is"
            f" {without[0]['id']} ({without[0]['prompt']!r}): a scorer asks them, so give each"
            " prompt one, or take that scorer out of config.scorers."
        )


def askable(
    prompt_rows: Sequence[Row], rows: Iterable[Row]
) -> tuple[dict[str, list[Row]], list[dict]]:
    """Prompt id -> the questions that can be asked; and rows of data/problems.py of the others."""
    asked, problems = {}, []
    for name, of_prompt in by_prompt(rows).items():
        faults = [fault(row) for row in of_prompt]
        problems += [problem("bad_questions", f"prompt {name}", what) for what in faults if what]
        if kept := only(of_prompt, [not what for what in faults]):
            asked[name] = kept
    problems += [
        problem("no_questions", f"prompt {row['id']}", repr(row["prompt"]))
        for row in prompt_rows
        if row["id"] not in asked
    ]
    return asked, problems
