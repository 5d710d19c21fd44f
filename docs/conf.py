"""How Sphinx builds these pages: `sphinx-build -W --keep-going -n docs build/docs`."""

import re

import agfsync_jax
from agfsync_jax.utils import configs

project = "agfsync_jax"
copyright = "the agfsync_jax authors"
version = release = agfsync_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]
myst_heading_anchors = 3
myst_enable_extensions = ["substitution"]

html_theme = "furo"
html_title = f"agfsync_jax {version}"
html_show_sourcelink = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns", "Attributes"]  # prose, that names no type
# What other packages define: their documentation lies on the network, where no build looks.
nitpick_ignore_regex = [
    ("py:class", r"(?!agfsync_jax\.)\w+\..*"),
    ("py:class", "Array|Device|ndarray|ArrayTree"),  # as jaxtyping and optax name them
]


def config_keys() -> str:
    """Every key of configs/common.py, in its order: a table for the experiment, then a block."""
    flat, told = configs.flatten(configs.load("configs/common.py", {})), configs.meanings()
    place = {name: index for index, name in enumerate(told)}
    tables = {"experiment": []}
    for key in sorted(flat, key=lambda key: place.get(key, place.get(key.rpartition(".")[0]))):
        block = key.partition(".")[0] if "." in key else "experiment"
        tables.setdefault(block, []).append(key)
    lines = []
    for block, keys in tables.items():
        lines += [f"## {block}", "", told.get(block, ""), ""]
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        for key in keys:
            meaning = told.get(key, "").replace("|", r"\|")
            lines.append(f"| `config.{key}` | `{flat[key]!r}` | {meaning} |")
        lines.append("")
    return "\n".join(lines)


myst_substitutions = {"config_keys": config_keys()}

_SECTIONS = {"Args:", "Returns:", "Raises:", "Attributes:"}


def plain_to_rst(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text with Google's sections, `code` and indented examples, not RST."""
    parts, in_section, in_item = [], "", False
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_item = line if line in _SECTIONS else "", False
        is_example = line.startswith("    ") and not in_section
        if not line and parts:
            is_example = parts[-1][0]  # a blank line belongs to what it follows
        if not parts or parts[-1][0] != is_example:
            parts.append((is_example, []))
        if in_section in ("Returns:", "Attributes:") and line.startswith("    "):
            starts = re.match(r"    \w[\w, ]*: ", line)
            in_item = in_item or bool(starts)
            line = f"    {'- ' if starts else '  ' * in_item}{line.strip()}"
        elif line.startswith("- "):
            parts[-1][1].append("")
        parts[-1][1].append(line)
    lines.clear()
    for is_example, part in parts:
        if is_example:
            lines += ["", "::", "", *part, ""]
        else:
            text = re.sub(r"`([^`]+)`(?=(\w?))|([*|\\]|_\b)", _inline, "\n".join(part))
            lines += text.split("\n")
    if what in ("attribute", "property"):
        lines.insert(0, "\\")  # or napoleon takes what stands before a colon for a type


def _inline(found: re.Match) -> str:
    code, next_letter, special = found.groups()
    if special:
        return f"\\{special}"
    return f"``{code}``" + ("\\ " if next_letter else "")


def shorten(app, what, name, obj, options, signature, result) -> tuple[str | None, ...]:
    """`Float[Array, "b c"]` as it is written, not with the module where jax hides its Array."""
    return tuple(
        text and re.sub(r"\b(jax\.)?jaxlib\._jax\.", "", text) for text in (signature, result)
    )


def skip_fields(app, what, name, obj, skip, options) -> bool | None:
    """A NamedTuple's fields stand in its signature; "alias for field 0" says nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip_fields)
