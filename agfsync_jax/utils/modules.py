"""Find code by name: a string in a config is the name of a module in a room."""

import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "agfsync_jax"


def names(room: str) -> list[str]:
    """The modules of a room (a folder of the package), sorted, but for those that its files share:
    their names begin with an underscore. Imports nothing of it."""
    folder = Path(__file__).parents[1].joinpath(*room.split("."))
    found = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in found if not name.startswith("_"))


def check(room: str, name: str) -> None:
    """Does nothing where agfsync_jax/<room>/<name>.py exists; imports nothing of it.

    Raises:
        ValueError: the room has no such file; the message lists those it has.
    """
    known = names(room)
    if name not in known:
        # a name in short, such as dpo, before one that is spelled alike
        close = [each for each in known if name and name in each.split("_")]
        close += difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{name!r} is not in {PACKAGE}/{room}, which has: {', '.join(known)}.{hint}"
            f" To add it, write {PACKAGE}/{room}/{name}.py."
        )


def settings(room: str, name: str) -> dict[str, Any]:
    """What a block of the config that names a file of the room may set besides, by parameter: the
    room's `settings_of` says it."""
    return importlib.import_module(f"{PACKAGE}.{room}").settings_of(load(room, name))


def load(room: str, name: str) -> ModuleType:
    """Imports agfsync_jax/<room>/<name>.py; ValueError as in `check` where there is none."""
    check(room, name)
    return importlib.import_module(f"{PACKAGE}.{room}.{name}")
