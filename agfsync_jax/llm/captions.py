"""Captions that a language model writes: what it is told, and what is kept of its answers.

Twelve categories as in AGFSync (arXiv:2403.13352, section 3.1), each with a theme and examples of
which every request shows a few; so many captions in a request that its instructions weigh little.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agfsync_jax.llm import requests
from agfsync_jax.llm.filters import Filter
from agfsync_jax.llm.requests import Answer, clean
from agfsync_jax.utils.files import to_path

CATEGORIES = Path(__file__).with_name("categories.json")
SHOWN = 5  # examples in a request
MIN_WORDS = 3
YIELD = 0.7  # of captions are kept, by the first estimate
_LEAST_YIELD = 0.05  # by later ones
MAX_TOKENS = 75  # of CLIP's text encoders, without begin and end

_BULLET = r"\s*(\d+[.):]|[-*•])\s+"
_SYSTEM = """\
You write captions for a text-to-image model. Each caption describes one picture that could exist.
- Say only what can be seen: things, how many there are, their colors, shapes and materials, where \
they are, what they do. No sounds, smells, thoughts or names of artists.
- Name at least two things, and how they stand to each other.
- Let captions differ in length, from eight to about forty words, and in subject: no two alike.
- Nothing frightening, violent or sexual.
- The examples show the kind. Do not repeat them, or vary them by a few words.
Answer with JSON alone, an object whose "captions" is a list of strings."""

_USER = """\
Kind of pictures: {name}: {theme}.
Examples:
{examples}
Write {number} new captions of that kind. Let some of them be {angle}, where that fits."""

_SCHEMA = requests.closed(captions=requests.listed({"type": "string"}))


@dataclasses.dataclass(frozen=True)
class Category:
    """A kind of pictures."""

    name: str
    theme: str
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Themes:
    """What a file of categories holds."""

    categories: tuple[Category, ...]
    angles: tuple[str, ...]


def load_themes(path: str = "") -> Themes:
    """The categories of a JSON file; those that ship where none is named.

    Raises:
        FileNotFoundError, ValueError: no such file, or not of their form.
    """
    file = to_path(path).expanduser() if path else CATEGORIES
    if not file.exists():
        raise FileNotFoundError(f"no file {file} of categories; {CATEGORIES} shows the form.")
    try:
        found = json.loads(file.read_bytes())
        themes = Themes(
            tuple(
                Category(each["name"].strip(), each["theme"].strip(), tuple(each["examples"]))
                for each in found["categories"]
            ),
            tuple(found.get("angles") or ("unlike the others",)),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no categories ({type(error).__name__}: {error}): expected an object with"
            ' "categories", each with "name", "theme" and "examples", and perhaps "angles", as in'
            f" {CATEGORIES}."
        ) from error
    names = [each.name for each in themes.categories]
    texts = [*themes.angles, *(text for each in themes.categories for text in each.examples)]
    if not names or len(set(names)) < len(names) or not all(names):
        raise ValueError(f"{file}: expected categories with a name of its own each, found {names}.")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{file}: examples and angles must be texts that are not empty.")
    if few := [each.name for each in themes.categories if len(set(each.examples)) < SHOWN]:
        raise ValueError(f"{file}: {few[0]!r} has fewer than {SHOWN} different examples.")
    return themes


def shares(number: int, themes: Themes) -> dict[str, int]:
    """How many captions of each category there are in `number`."""
    whole, more = divmod(number, len(themes.categories))
    return {each.name: whole + (i < more) for i, each in enumerate(themes.categories)}


def write_requests(
    themes: Themes,
    counts: Mapping[str, int],
    first: Mapping[str, int],
    *,
    wave: int,
    per_request: int,
    key: Sequence[int],
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """A wave's requests.

    Args:
        counts: how many of each category.
        first: how many of each there were in earlier waves; no two are alike.
        per_request: captions that each asks for.
        key: numbers, from which all that is random derives.
        **settings: of `requests.request`.
    """
    for index, category in enumerate(themes.categories):
        start = first.get(category.name, 0)
        for number in range(start, start + counts.get(category.name, 0)):
            rng = np.random.default_rng([*key, index, number])
            shown = rng.choice(len(category.examples), SHOWN, replace=False)
            lines = [f"{i}. {category.examples[each]}" for i, each in enumerate(shown, 1)]
            # Angles go round, so that requests of one category differ in their first few dozen.
            angle = themes.angles[(number + index) % len(themes.angles)]
            told = _USER.format(
                name=category.name,
                theme=category.theme,
                examples="\n".join(lines),
                number=per_request,
                angle=angle,
            )
            yield requests.request(
                f"captions-{wave:03d}-{index:02d}-{number:05d}",
                [("system", _SYSTEM), ("user", told)],
                schema=_SCHEMA,
                seed=int(rng.integers(2**31)),
                **settings,
            )


def next_counts(
    short: Mapping[str, int],
    kept: Mapping[str, int],
    asked: Mapping[str, int],
    per_request: int,
    limit: int,
) -> dict[str, int]:
    """Requests of each category in the next wave.

    Args:
        short: captions that are missing.
        kept, asked: captions and requests so far; what was kept of a category's answers is what
            the next ones are expected to give.
        limit: of requests in all.
    """
    wanted = {}
    for name, missing in short.items():
        before = asked[name] * per_request
        share = max(kept[name] / before, _LEAST_YIELD) if before else YIELD
        wanted[name] = math.ceil(missing / (per_request * share)) if missing else 0
    left = limit - sum(asked.values())
    while sum(wanted.values()) > left:
        wanted[max(wanted, key=wanted.get)] -= 1
    return wanted


def category_of(custom_id: str, themes: Themes) -> str:
    """The category that a request was of."""
    return themes.categories[int(custom_id.split("-")[2])].name


class Sieve(Filter):
    """Takes captions answer by answer."""

    def __init__(self, themes: Themes, *, too_long: str, known: Mapping[str, str]):
        """`known`: text -> of what, such as "held-out prompts"; copies of them are dropped."""
        super().__init__()
        self.names = {each.name for each in themes.categories}
        self.copied = {_plain(text) for each in themes.categories for text in each.examples}
        self.seen = {_plain(text): of for text, of in known.items()}
        self.drops_long = too_long == "drop"
        self._tokens = None

    def captions(self, answer: Answer, category: str) -> Iterator[str]:
        """What is left of an answer."""
        items = requests.read_list(answer, "captions") or _lines(answer.text)
        for item in self.things(answer, items):
            if text := self._kept(item, category):
                yield text

    def whose(self, of: str, category: str) -> str:
        """Behind what a caption repeats: where that is from."""
        if of in self.names:
            return " in their category" if of == category else " from another category"
        return f" from {of}"

    def _kept(self, item: Any, category: str) -> str:
        if isinstance(item, Mapping):  # {"caption": "..."}
            named = [item[key] for key in ("caption", "description", "prompt") if key in item]
            item = (named or [item])[0]
        if not isinstance(item, str):
            self.drop("not a text", str(item))
            return ""
        text = re.sub(_BULLET, "", clean(item)).strip("\"'“”").strip()
        plain = _plain(text)
        why = ""
        if not plain:
            why = "empty"
        elif len(re.findall(r"[^\W\d_]+", plain)) < MIN_WORDS:
            why = "too short"
        elif requests.REFUSALS.match(text):
            why = "refusals"
        elif plain in self.copied:
            why = "copies of an example"
        elif plain in self.seen:
            why = f"repeated{self.whose(self.seen[plain], category)}"
        elif self.num_tokens(text) > MAX_TOKENS:
            why = "too long" if self.drops_long else ""
            if not why:
                self.remarks[f"have over {MAX_TOKENS} tokens, of which the text encoder cuts"] += 1
        if why:
            self.drop(why, text or str(item))
            return ""
        self.seen[plain] = category
        return text

    def num_tokens(self, text: str) -> int:
        """Of CLIP's tokenizer, as all Stable Diffusions have it, without begin and end."""
        if len(text) <= MAX_TOKENS:  # a token is one character at least
            return len(text)
        if self._tokens is None:
            from agfsync_jax.data.tokenizers import OpenClipTokenizer

            self._tokens = OpenClipTokenizer()
        return len(self._tokens.encode(text))


def chosen(rows: Sequence[dict], share: Mapping[str, int]) -> list[dict]:
    """Each category's share, the first ones; of the others as many as are missing elsewhere."""
    taken: Counter[str] = Counter()
    picked, others = [], []
    for row in rows:
        taken[row["category"]] += 1
        (picked if taken[row["category"]] <= share[row["category"]] else others).append(row)
    return interleaved(picked + others[: sum(share.values()) - len(picked)])


def interleaved(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in turn of each category, in the order of their first ones, so that the first few have
    all of them."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(dict(row))
    longest = max(map(len, groups.values()), default=0)
    return [group[i] for i in range(longest) for group in groups.values() if i < len(group)]


def _plain(text: str) -> str:
    """Texts that differ in case, spaces or punctuation alone are one."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())


def _lines(text: str) -> list[str]:
    """The entries of a list that was written as text."""
    return [line for line in text.splitlines() if re.match(_BULLET, line)]
