"""The parts of a page, a file each: whatever lies here is shown, at its place.

A file exports `PANEL = Panel(...)`. Its function takes the page's data, which `rounds.Report`,
`candidates.Gallery` and `runs.Comparison` are, and returns what its template is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agfsync_jax.utils import modules

CHARTS = "{{ m.cards(charts) }}"


@dataclass(frozen=True)
class Panel:
    """A part of a page.

    Attributes:
        page: "report" (its data a `rounds.Report`), "pairs" (a `candidates.Gallery`) or "compare"
            (a `runs.Comparison`).
        place: where it stands: from top to bottom, lower numbers first.
        show: the page's data -> the variables of the template; {} where there is nothing to show.
            "note" among them is a line under the title that says how to read what follows.
        title: its heading, if it has one.
        template: Jinja; `m` has the macros of templates/macros.html. All values are escaped.
    """

    page: str
    place: int
    show: Callable[[Any], dict[str, Any]]
    title: str = ""
    template: str = CHARTS


def of_page(page: str) -> list[Panel]:
    """The panels of a page, in order."""
    room = "reports.panels"
    every = [modules.load(room, name).PANEL for name in modules.names(room)]
    return sorted((panel for panel in every if panel.page == page), key=lambda panel: panel.place)
