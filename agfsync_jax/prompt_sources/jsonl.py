"""Your own files: prompts and questions as .jsonl, .json (a list of rows, TIFA's format) or .txt.

prompts: rows with "prompt" (or "caption"), and where you like "id", "category", "split"; a .txt has
one prompt a line. questions: rows with "question", "answer", "choices" (yes and no if absent),
"element_type", "element", and "id" (the prompt's) or "caption" (its text) to say whose they are;
"dependency" lists the places, from 0, of the prompt's other questions that one depends on.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.data.questions import fault
from agfsync_jax.prompt_sources import normalized, prompt_id
from agfsync_jax.utils.files import to_path

YES_NO = ["yes", "no"]
# Field of a question -> what stands there if the row has none; None where it must have one.
_QUESTION = dict(id="", caption="", question=None, answer=None, element_type="other", element="")


def prompts(
    num_prompts: int, *, split: str, seed: int, round_index: int, path: str, heldout: float = 0.1
) -> list[dict]:
    """`num_prompts` of the distinct prompts of the file `path`; 0: all of them.

    The file is shuffled by `seed`, and each round takes the next `num_prompts`; once too few are
    left it is shuffled anew. Where rows name a "split", that is followed; otherwise the share
    `heldout` of the prompts, fixed by their text, is kept for every split but "train". The split
    "all" is the whole file.

    Raises:
        FileNotFoundError, ValueError: no such file; a bad row (with its line); too few prompts.
    """
    rows = _in_split(_distinct(path), split, heldout)
    num_prompts = num_prompts or len(rows)
    if not 0 < num_prompts <= len(rows):
        raise ValueError(
            f"{path} has {len(rows)} distinct prompts in split {split!r}, and num_prompts asks for"
            f" {num_prompts}: ask for fewer, add prompts, or name another split."
        )
    shuffle, window = divmod(round_index, len(rows) // num_prompts)
    order = np.random.default_rng([seed, shuffle]).permutation(len(rows))
    picked = order[window * num_prompts : (window + 1) * num_prompts]
    return [
        row | {"id": row["id"] or prompt_id(split, round_index, index), "source": Path(path).name}
        for index, row in enumerate(rows[number] for number in picked)
    ]


def questions(prompt_rows: list[dict], *, seed: int, path: str) -> list[dict]:
    """The questions of the file `path` that belong to `prompt_rows`, in the order of the prompts.

    Raises:
        FileNotFoundError, ValueError: no such file; a bad row (with its line).
    """
    del seed  # nothing is drawn
    texts = {normalized(row["prompt"]): row["id"] for row in prompt_rows}
    found: dict[str, dict[str, dict]] = {row["id"]: {} for row in prompt_rows}
    places: dict[str, list[int]] = {row["id"]: [] for row in prompt_rows}  # of each in the file
    repeated = 0
    for where, row in _rows(path):
        question = _question(where, row)
        known = question["id"] in found
        owner = question["id"] if known else texts.get(normalized(question["caption"]))
        if owner is None:
            continue  # of a prompt that this round did not draw
        repeated += question["question"] in found[owner]
        found[owner].setdefault(question["question"], question | {"id": owner})
        places[owner].append(list(found[owner]).index(question["question"]))
    if repeated:
        print(f"{path}: {repeated} questions that repeat another of their prompt were removed")
    for owner, asked in found.items():
        own = dict(enumerate(places[owner]))
        for question in asked.values():
            if depends := question.get("dependency"):
                question["dependency"] = [own[each] for each in depends if each in own]
    return [
        question | {"caption": row["prompt"]}
        for row in prompt_rows
        for question in found[row["id"]].values()
    ]


def _rows(path: str) -> Iterator[tuple[str, dict]]:
    """(place in the file, row) of each row; a line of a .txt file becomes {"prompt": line}."""
    if not path:
        raise ValueError(
            'The source "jsonl" reads a file of yours: set `path` in each block of the config that '
            "names it (config.prompts.path, config.questions.path, config.evaluate.path)."
        )
    file = to_path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"No file {file}: expected prompts or questions in it.")
    text = io.TextIOWrapper(io.BytesIO(file.read_bytes()), "utf-8-sig").read()
    if file.suffix == ".json":
        rows = _parse(file, 1, text)
        if not isinstance(rows, list):
            raise ValueError(
                f"{file}: expected a JSON list of rows, found a {type(rows).__name__}."
            )
        places = [(f"{file}: row {number}", row) for number, row in enumerate(rows, 1)]
    elif file.suffix in (".jsonl", ".txt"):
        lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        is_text = file.suffix == ".txt"
        places = [
            (f"{file}:{n}", {"prompt": line} if is_text else _parse(file, n, line))
            for n, line in lines
        ]
    else:
        raise ValueError(f"{file}: expected a name that ends in .jsonl, .json or .txt.")
    for where, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named fields, found {row!r:.60}.")
        yield where, row


def _parse(file: Path, line: int, text: str) -> Any:
    """The JSON that begins in a line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}:{line + error.lineno - 1}"
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}.") from error


def _text(where: str, row: dict, *names: str, default: str | None = None) -> str:
    """The first of the fields `names` that the row has; it must be text, and not empty."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        if default is not None:
            return default
        known = ", ".join(map(repr, row)) or "no field"
        raise ValueError(f"{where}: no {' or '.join(map(repr, names))}; the row has {known}.")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name!r} must be text that is not empty, found {value!r:.60}.")
    return value.strip()


def _distinct(path: str) -> list[dict]:
    kept: dict[str, dict] = {}
    places: dict[str, str] = {}
    repeated = 0
    for where, row in _rows(path):
        prompt = {"prompt": _text(where, row, "prompt", "caption")}
        for name, default in (("id", ""), ("category", "none"), ("split", "")):
            prompt[name] = _text(where, row, name, default=default)
        if kept.setdefault(normalized(prompt["prompt"]), prompt) is not prompt:
            repeated += 1
            continue
        first = places.setdefault(prompt["id"] or where, where)
        if first != where:
            raise ValueError(
                f"{where}: id {prompt['id']!r} already names another prompt, at {first}:"
                " give each prompt its own id, or none."
            )
    if repeated:
        print(f"{path}: {repeated} repeated prompts were removed, {len(kept)} are left")
    return list(kept.values())


def _in_split(rows: list[dict], split: str, heldout: float) -> list[dict]:
    if split == "all":
        return rows
    if any(row["split"] for row in rows):
        return [row for row in rows if row["split"] == split]

    def is_heldout(row: dict) -> bool:
        digest = hashlib.sha256(normalized(row["prompt"]).encode()).digest()
        return int.from_bytes(digest[:4], "big") < heldout * 2**32

    return [row for row in rows if is_heldout(row) == (split != "train")]


def _question(where: str, row: dict) -> dict:
    choices = row.get("choices", YES_NO)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: 'choices' must list texts, found {choices!r:.80}.")
    if row.get("id") is None and row.get("caption") is None:
        raise ValueError(f"{where}: no 'id' and no 'caption': whose question is it?")
    question = {name: _text(where, row, name, default=_QUESTION[name]) for name in _QUESTION}
    question["choices"] = list(dict.fromkeys(choices))
    if "dependency" in row:
        question["dependency"] = row["dependency"]
    if what := fault(question):
        raise ValueError(
            f"{where}: {what}; expected two or more different choices, and the answer among them."
        )
    return question
