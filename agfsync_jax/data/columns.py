"""What a column of scores is, for those who read it."""

from collections.abc import Iterable
from typing import NamedTuple

KEYS = ("prompt_id", "candidate")  # the two columns that say which image a row is about


class Column(NamedTuple):
    """What a scorer or an evaluator says of a column that it makes.

    Attributes:
        about: what the number is, a part of a sentence without a full stop.
        format: of a value, such as ".3f"; "%" for a share between 0 and 1.
        higher_is_better: false where a low number is what one wants.
    """

    about: str = ""
    format: str = ".3f"
    higher_is_better: bool = True


def without_parts(names: Iterable[str]) -> list[str]:
    """The columns, in order, that are no part ("a/b") of another one ("a")."""
    names = list(names)
    return [name for name in names if "/" not in name or name.split("/")[0] not in names]
