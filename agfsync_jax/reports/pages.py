"""A self-contained HTML page of panels: no scripts, and nothing that is fetched.

Jinja escapes whatever is not a template; only charts come as markup.
"""

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from agfsync_jax.reports import formats, panels


class Picture(NamedTuple):
    """What an <img> needs; `crisp` asks for hard pixels."""

    source: str
    width: int
    height: int
    crisp: bool


def picture(png: bytes, side: int = 512) -> Picture:
    """The picture itself, shrunk to `side` pixels; below 128 as a PNG, else as a smaller JPEG."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    crisp = max(image.size) < 128
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream, kind = io.BytesIO(), "png" if crisp else "jpeg"
    image.save(stream, kind, optimize=True, quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{data}", *image.size, crisp)


@functools.cache
def environment() -> jinja2.Environment:
    """The templates, their filters, and `m`, the macros."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("agfsync_jax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": formats.count,
        "duration": formats.duration,
        "percent": formats.whole_percent,
        "picture": picture,
    }
    environment.globals["m"] = environment.get_template("macros.html").module
    return environment


def render(
    page: str, title: str, facts: Sequence[str], data: Any, links: Sequence[tuple[str, str]] = ()
) -> str:
    """The whole document of a page.

    Args:
        page: which panels it has.
        facts: under the title.
        data: what the panels take.
        links: (where, text) after the facts.
    """
    shown = []
    for panel in panels.of_page(page):
        if values := panel.show(data):
            body = environment().from_string(panel.template).render(values)
            shown.append((panel.title, values.get("note", ""), Markup(body)))
    template = environment().get_template("page.html")
    return template.render(title=title, facts=facts, links=links, panels=shown)
