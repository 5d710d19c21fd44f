"""Questions that a language model asks about captions: what it is told, and what is kept.

One request a caption. Three styles: "yes_no", as AGFSync has them (arXiv:2403.13352, section 3.2);
"multiple_choice", as TIFA (arXiv:2303.11897); "dsg", with each question's dependencies, as the
Davidsonian Scene Graph (arXiv:2310.18235).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from agfsync_jax.data.questions import only
from agfsync_jax.llm import requests
from agfsync_jax.llm.filters import Filter
from agfsync_jax.llm.requests import Answer, clean

STYLES = ("yes_no", "multiple_choice", "dsg")
TYPES = """object human animal food activity attribute counting color material spatial location
    shape other""".split()
YES_NO = ["yes", "no"]

_RULES = """\
You check pictures against their caption. Write questions about the caption whose right answer it \
states, so that someone who sees only the picture can tell whether it fits.
- One fact a question; no two ask the same; together they cover all that the caption says.
- Ask for what the caption says, not for what is likely or always so."""
_ELEMENT = """\
- "element" is the word or words of the caption that the question is about, as they stand there.
- "type" is what the element is: {types}."""
_STYLE = {
    "yes_no": "- Each can be answered with yes or no, and the right answer is yes.\n" + _ELEMENT,
    "multiple_choice": (
        '- "choices" are four short answers, of which one is right; a yes/no question has "yes" and'
        ' "no", a count has 1, 2, 3, 4. "answer" is the right one, spelled as in "choices".\n'
        + _ELEMENT
    ),
    "dsg": (
        '- First break the caption into its smallest facts. "tuple" is one, as "entity - whole'
        ' (car)", "attribute - color (car, red)", "relation - spatial (car, tree, beside)",'
        ' "global - style (watercolor)".\n'
        "- Each question asks whether its fact holds, and the right answer is yes.\n"
        '- "depends_on" lists the numbers, from 1, of the questions that must be true for this one'
        " to make sense: the color of a car depends on there being a car."
    ),
}
_EXAMPLE = "a red bus under two palm trees"
_ASKED = {
    "yes_no": (
        dict(question="Is there a bus?", type="object", element="bus"),
        dict(question="Is the bus red?", type="color", element="red"),
        dict(question="Are there two palm trees?", type="counting", element="two palm trees"),
    ),
    "multiple_choice": (
        dict(
            question="What color is the bus?",
            choices=["red", "blue", "yellow", "green"],
            answer="red",
            type="color",
            element="red",
        ),
        dict(
            question="Are there palm trees?",
            choices=["yes", "no"],
            answer="yes",
            type="object",
            element="palm trees",
        ),
    ),
    "dsg": (
        dict(tuple="entity - whole (bus)", question="Is there a bus?", depends_on=[]),
        dict(tuple="attribute - color (bus, red)", question="Is the bus red?", depends_on=[1]),
    ),
}
_ENDING = """
Answer with JSON alone, an object whose "questions" is a list of {number} or more. Of "{caption}" \
it would begin: {example}"""
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_TYPE = {"type": "string", "enum": TYPES}
_SCHEMAS = {
    "yes_no": dict(question=_TEXT, type=_TYPE, element=_TEXT),
    "multiple_choice": dict(
        question=_TEXT, choices=requests.listed(_TEXT), answer=_TEXT, type=_TYPE, element=_TEXT
    ),
    "dsg": dict(tuple=_TEXT, question=_TEXT, depends_on=requests.listed(_NUMBER)),
}
# What a fact of a scene graph is -> TIFA's type, the first that fits.
_OF_TUPLES = (
    ("count", "counting"),
    ("color", "color"),
    ("material", "material"),
    ("texture", "material"),
    ("shape", "shape"),
    ("spatial", "spatial"),
    ("action", "activity"),
    ("attribute", "attribute"),
    ("entity", "object"),
)
_CHECK = """\
Answer each question from the text alone, with one of its choices. Where the text does not say it, \
answer "unknown". Answer with JSON alone, an object whose "answers" has one string a question."""
_OPEN = set("what which who whom whose where when why how".split())
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_DIGITS = {str(number) for number in range(len(_NUMBERS))}
_LITTLE = set("a an and are as at by for from in is it its of on or the to with".split())


def write_requests(
    rows: Iterable[Mapping[str, Any]],
    *,
    wave: int,
    style: str,
    number: int,
    key: Sequence[int],
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """A request a prompt.

    Args:
        rows: of prompts.
        style: one of `STYLES`.
        number: questions that are asked for.
        key: numbers, from which the server's seeds derive, with the row's place.
        **settings: of `requests.request`.
    """
    example = json.dumps({"questions": _ASKED[style]})
    rules = f"{_RULES}\n{_STYLE[style].format(types=', '.join(TYPES))}"
    told = rules + _ENDING.format(number=number, caption=_EXAMPLE, example=example[:-2] + ", ...")
    schema = requests.closed(questions=requests.listed(requests.closed(**_SCHEMAS[style])))
    for place, row in enumerate(rows):
        yield requests.request(
            custom_id(row, wave),
            [("system", told), ("user", row["prompt"])],
            schema=schema,
            seed=_seed(key, wave, place),
            **settings,
        )


def write_checks(
    rows: Iterable[Mapping[str, Any]],
    asked: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    wave: int,
    key: Sequence[int],
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """Requests that put the questions to the caption itself, as TIFA filters them; see
    `write_requests`."""
    schema = requests.closed(answers=requests.listed(_TEXT))
    for place, row in enumerate(rows):
        lines = [
            f"{i}. {each['question']} ({' | '.join(each['choices'])})"
            for i, each in enumerate(asked[row["id"]], 1)
        ]
        text = f"Text: {row['prompt']}\nQuestions:\n" + "\n".join(lines)
        yield requests.request(
            custom_id(row, wave),
            [("system", _CHECK), ("user", text)],
            schema=schema,
            seed=_seed(key, wave, place),
            **settings,
        )


def custom_id(row: Mapping[str, Any], wave: int) -> str:
    """The name of a prompt's request."""
    return f"questions-{wave:03d}-{row['id']}"


class Examiner(Filter):
    """Takes questions answer by answer."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style

    def questions(
        self, answer: Answer, row: Mapping[str, Any], before: Sequence[Mapping[str, Any]] = ()
    ) -> list[dict[str, Any]]:
        """The questions of an answer about a prompt, in TIFA's fields; none of `before` again."""
        items = requests.read_list(answer, "questions")
        words = _stems(row["prompt"])
        seen = {_plain(each["question"]) for each in before}
        kept: list[dict[str, Any]] = []
        places: dict[int, int] = {}  # number in the answer -> place among those kept
        for number, item in enumerate(self.things(answer, items), 1):
            question, why = self._question(item, words)
            if not why and _plain(question["question"]) in seen:
                why = "repeated"
            if why:
                said = item.get("question", item) if isinstance(item, Mapping) else item
                self.drop(why, f"{clean(str(said))} — {row['prompt']}")
                continue
            seen.add(_plain(question["question"]))
            places[number] = len(before) + len(kept)
            kept.append({"id": row["id"], "caption": row["prompt"], **question})
        if self.style == "dsg":
            for each in kept:
                parents = (places.get(number) for number in each.pop("depends_on"))
                own = len(before) + kept.index(each)
                each["dependency"] = sorted({p for p in parents if p not in (None, own)})
        return kept

    def _question(self, item: Any, words: set[str]) -> tuple[dict[str, Any], str]:
        """A question's own fields, and why it is dropped, if it is."""
        if not isinstance(item, Mapping) or not isinstance(item.get("question"), str):
            return {}, "not a question"
        text = clean(item["question"])
        if len(_plain(text).split()) < 2:
            return {}, "empty or too short"
        if requests.REFUSALS.match(text):
            return {}, "refusals"
        if self.style == "dsg":
            kind, element = _of_tuple(item.get("tuple"))
        else:
            kind, element = _text(item, "type").lower(), _text(item, "element")
        found = {"question": text, "choices": YES_NO, "answer": "yes"}
        if self.style == "multiple_choice":
            choices = item.get("choices")
            choices = choices if isinstance(choices, list) else YES_NO
            choices = list(dict.fromkeys(clean(str(c)) for c in choices if str(c).strip()))
            answer = _plain(_text(item, "answer"))
            right = next((each for each in choices if _plain(each) == answer), None)
            if len(choices) < 2:
                return {}, "no choices"
            if right is None:
                return {}, "answer not among the choices"
            found |= {"choices": choices, "answer": right}
        elif _text(item, "answer").lower().rstrip(".") not in ("", "yes", "true"):
            return {}, "answer other than yes"
        elif text.split()[0].lower() in _OPEN:
            return {}, "no yes/no question"
        if kind not in TYPES:
            return {}, "unknown type"
        if not element:
            return {}, "no element"
        if not _stems(element) - {"count", "number"} <= words:
            return {}, "element not in the caption"
        found |= {"element_type": kind, "element": element}
        if self.style == "dsg":
            depends = item.get("depends_on")
            found["depends_on"] = [n for n in depends if isinstance(n, int)] if depends else []
        return found, ""

    def confirmed(
        self, answer: Answer | None, asked: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """Those questions that the caption itself answers as they expect."""
        said = [] if answer is None or answer.fault else requests.read_list(answer, "answers")
        if len(said) != len(asked):
            self.remarks["could not be checked, and are kept"] += len(asked)
            return list(asked)
        pairs = list(zip(map(str, said), asked, strict=True))
        right = [_plain(text) == _plain(each["answer"]) for text, each in pairs]
        for is_right, (text, each) in zip(right, pairs, strict=True):
            if not is_right:
                told = f"{each['question']} {each['answer']}, not {clean(text)!r:.40}"
                self.drop("the caption answers otherwise", f"{told} — {each['caption']}")
        return only(asked, right)


def _of_tuple(text: Any) -> tuple[str, str]:
    """The type and the element of a fact such as "attribute - color (car, red)"."""
    match = re.match(r"\s*(?:\d+\s*[|.]\s*)?([\w\s/-]+?)\s*\((.+)\)\s*$", text) if text else None
    if not match:
        return "", ""
    name = match[1].lower()
    kind = next((kind for word, kind in _OF_TUPLES if word in name), "other")
    return kind, clean(match[2])


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    return clean(value) if isinstance(value, str) else "" if value is None else str(value)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]|_", " ", text.casefold()).split())


def _stems(text: str) -> set[str]:
    """Words of a text without endings of the plural, numbers as words; little words left out."""
    words = set(_plain(text).split()) - _LITTLE
    return {_stem(_NUMBERS[int(w)] if w in _DIGITS else w) for w in words}


def _stem(word: str) -> str:
    """horses, horse -> hor; berries, berry -> berry."""
    stem = word.rstrip("es") or word
    return stem[:-1] + "y" if stem.endswith("i") else stem


def _seed(key: Sequence[int], wave: int, place: int) -> int:
    return int(np.random.default_rng([*key, wave, place]).integers(2**31))
