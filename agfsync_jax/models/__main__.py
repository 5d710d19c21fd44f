"""Prints which fields of config.json each network honors: `python -m agfsync_jax.models`."""

import importlib
import pkgutil
from collections.abc import Iterable

from agfsync_jax import models
from agfsync_jax.models.layers import BOOKKEEPING, USUAL, ModelConfig, in_json

_HEAD = """# The fields of config.json

A network is built from the `config.json` of its diffusers or transformers folder. These are all the
fields that each network knows: those it honors, those of which it supports some values only, and
those without effect here. An unknown field or an unsupported value is an error that names it.
`python -m agfsync_jax.models` prints this page.
"""
_TAIL = """
## Fields that no network reads

These are bookkeeping, settings of generation, and dropout (which these networks do not do); any
value is accepted, and so is any field whose name begins with an underscore:
"""


def config_classes() -> Iterable[type[ModelConfig]]:
    """The configs of this room's files, each after those that are parts of it."""
    names = [module.name for module in pkgutil.iter_modules(models.__path__)]
    files = [importlib.import_module(f"{models.__name__}.{name}") for name in names]
    found = [value for file in files for value in vars(file).values() if isinstance(value, type)]
    configs = [cls for cls in found if issubclass(cls, ModelConfig) and cls is not ModelConfig]
    return dict.fromkeys(configs)


def page() -> str:
    """All tables, as Markdown."""
    table = ["| field | support | values | default |", "| --- | --- | --- | --- |"]
    lines = [_HEAD]
    for cls in config_classes():
        lines += [f"## {cls.__name__}", "", cls.__doc__.split("\n")[0], ""]
        lines += table + [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in cls.support()]
        lines.append("")
    lines += ["## All networks", "", *table]
    lines += [
        f"| `{name}` | only these values | {in_json(values)} | |" for name, values in USUAL.items()
    ]
    lines += [_TAIL, ", ".join(f"`{name}`" for name in sorted(BOOKKEEPING)) + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
