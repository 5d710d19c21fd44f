"""What a stage left out, and went on: named, counted, and refused where it is too much."""

from collections import Counter
from collections.abc import Iterable, Mapping

# kind -> (of what it is a part, what it is called)
KINDS = {
    "damaged": ("images", "in damaged shards"),
    "undecodable": ("images", "that cannot be decoded"),
    "nonfinite": ("scores", "that are not finite"),
    "no_questions": ("prompts", "without a question"),
    "bad_questions": ("questions", "that are empty or expect an answer that is no choice"),
    "unanswered": ("answers", "that could not be given"),
}
OF_IMAGES = [kind for kind, (unit, _) in KINDS.items() if unit == "images"]
_NAMED = 5  # of each kind


class Problems:
    """Rows {"kind", "where", "what", "count"}, against how many things there are.

    Args:
        totals: how many images, scores, ... the stage has to do with.
        limit: the share of them that may be left out.
        setting: the config's key of the limit, for the message.
    """

    def __init__(self, totals: Mapping[str, int], limit: float, setting: str):
        if not 0 <= limit <= 1:
            raise ValueError(f"{setting}={limit}: expected a share, 0 to 1.")
        self.rows: list[dict] = []
        self._counts = Counter()
        self._totals, self._limit, self._setting = dict(totals), limit, setting

    def add(self, rows: Iterable[dict]) -> None:
        """Counts more of them. Raises ValueError where they are now too many of their kind."""
        for row in rows:
            self.rows.append(row)
            self._counts[row["kind"]] += row["count"]
        for kind, count in self.counts().items():
            total = self._totals[KINDS[kind][0]]
            if count > self._limit * total:
                named = "".join(f"\n  {line}" for line in self.named(kind))
                raise ValueError(
                    f"{self._told(kind, count)} are {count / max(total, 1):.1%}, more than"
                    f" {self._setting}={self._limit:g} allows:{named}\n"
                    "What is done is kept. Mend them and go on with --repair, or raise that limit."
                )

    def counts(self) -> dict[str, int]:
        """Kind -> how many, of those that there are."""
        return {kind: self._counts[kind] for kind in KINDS if self._counts[kind]}

    def named(self, kind: str) -> list[str]:
        """The first of a kind, a line each."""
        found = [f"{row['where']}: {row['what']}" for row in self.rows if row["kind"] == kind]
        more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        return found[:_NAMED] + more

    def told(self) -> list[str]:
        """For the terminal: a line a kind, and below it the first ones."""
        lines = []
        for kind, count in self.counts().items():
            lines += [f"left out: {self._told(kind, count)}", *self.named(kind)]
        return lines

    def _told(self, kind: str, count: int) -> str:
        unit, what = KINDS[kind]
        return f"{count:,} of {self._totals[unit]:,} {unit} {what}"


def problem(kind: str, where: str, what: str, count: int = 1) -> dict:
    """A row of `Problems`."""
    return {"kind": kind, "where": where, "what": what, "count": count}
