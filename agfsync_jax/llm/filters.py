"""What becomes of the things that a language model writes: what is kept, and why others are not."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from agfsync_jax.llm.requests import Answer

EXAMPLES = 5  # of each reason
_LETTERS = 300  # of an example


class Filter:
    """Counts what is read of answers, each thing that is dropped under one reason.

    Attributes:
        read: how many things were in the answers.
        dropped: of those, by reason.
        lost: answers that hold nothing, by reason.
        remarks: what is worth knowing, and drops nothing.
        examples: reason -> a few.
    """

    def __init__(self):
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def drop(self, why: str, text: str = "", count: int = 1) -> None:
        """A thing is not kept."""
        self.dropped[why] += count
        self._keep_example(why, text)

    def things(self, answer: Answer, items: list[Any]) -> Iterator[Any]:
        """Those of an answer, counted; `items` are what was found in it."""
        why = answer.fault or ("" if items else "unreadable answers")
        if why:
            self.lost[why] += 1
            self._keep_example(why, answer.error or answer.refusal or answer.text)
            return
        if answer.finish_reason == "length":
            self.remarks["answers were cut off, and read as far as they went"] += 1
        for item in items:
            self.read += 1
            yield item

    def facts(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "read": self.read,
            "dropped": dict(self.dropped.most_common()),
            "lost": dict(self.lost.most_common()),
            "remarks": dict(self.remarks.most_common()),
            "examples": self.examples,
        }

    def summary(self) -> str:
        """Losses in a line."""
        told = [f"{n:,} {why}" for why, n in (self.dropped + self.lost).most_common()]
        told += [f"{n:,} {what}" for what, n in self.remarks.most_common()]
        return ", ".join(told) or "nothing was lost"

    def _keep_example(self, why: str, text: str) -> None:
        text = " ".join(text.split())
        if text and len(self.examples.setdefault(why, [])) < EXAMPLES:
            self.examples[why].append(text[:_LETTERS])
