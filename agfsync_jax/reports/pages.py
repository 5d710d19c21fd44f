"""The parts of a self-contained HTML page: its frame, tables, cards, images; and a contact sheet.

Functions return HTML. `escape` every text that came from outside before handing it over as HTML;
arguments called title, header, alt and caption are escaped here.
"""

import base64
import html
import io

from PIL import Image, ImageDraw, ImageFont

STYLE = """
:root { color-scheme: light; --ink: #1c2330; --faint: #667085; --line: #e3e7ee;
  --base: #5b6575; --tuned: #2457d6; --up: #0b7a4b; --down: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 14px 60px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 10px 0 2px; letter-spacing: -.01em; }
h2 { font-size: 1.22rem; margin: 44px 0 4px; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.faint, small { color: var(--faint); }
small { font-size: .8rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px;
  min-width: 0; overflow-wrap: anywhere; }
.cards { display: grid; gap: 12px; margin: 12px 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.scroll { overflow-x: auto; }
.card h3 { margin-top: 2px; }
.scroll th, .scroll td { overflow-wrap: normal; }
.note { color: var(--faint); font-size: .82rem; line-height: 1.45; }
.small-cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 264px), 1fr)); }
.verdict { border-left: 6px solid #98a2b3; margin: 16px 0; font-size: 1.04rem; }
.verdict p { margin: 0 0 8px; }
.verdict p:first-child { font-weight: 700; font-size: 1.15rem; }
.verdict p:last-child { margin: 0; }
.verdict.good { border-left-color: var(--up); }
.verdict.bad { border-left-color: var(--down); }
.verdict.warn { border-left-color: #e0a100; background: #fffaeb; }
.up, .yes { color: var(--up); font-weight: 700; }
.down, .no { color: var(--down); font-weight: 700; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 6px; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
td .up, td .down { white-space: nowrap; }
th { font-size: .78rem; color: var(--faint); font-weight: 600; }
td small { display: block; white-space: nowrap; font-weight: 400; }
td:first-child small { white-space: normal; max-width: 40ch; line-height: 1.3; }
.caption { font-weight: 600; font-size: .94rem; margin: 0 0 8px; line-height: 1.3;
  min-height: 2.6em; }
.duo, .quartet { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.quartet { grid-template-columns: repeat(4, 1fr); }
figure { margin: 0; }
figcaption { font-size: .8rem; line-height: 1.35; color: var(--faint); padding-top: 4px; }
figcaption b { display: block; }
.base b { color: var(--base); }
.tuned b { color: var(--tuned); }
.chosen b, .best b { color: var(--up); }
.rejected b, .worst b { color: var(--down); }
.gone { aspect-ratio: 1; display: grid; place-items: center; border-radius: 6px;
  background: #eef1f5; color: var(--faint); font-size: .8rem; }
img { width: 100%; height: auto; display: block; border-radius: 6px; background: #eef1f5; }
img.crisp { image-rendering: pixelated; }
table.answers { font-size: .82rem; margin-top: 8px; }
.answers td, .answers th { padding: 4px 0 4px 8px; line-height: 1.3; }
.answers td:first-child, .answers th:first-child { padding-left: 0; }
.answers td + td, .answers th + th { width: 4.2em; text-align: left; }
.wide-answers td + td, .wide-answers th + th { width: 5.6em; }
.counts td, .counts th { padding: 5px 0 5px 8px; border: 0; font-size: .88rem; line-height: 1.3; }
.counts td:first-child { padding-left: 0; }
.counts td + td, .counts th + th { width: 1%; white-space: nowrap; }
.counts th { font-size: .78rem; }
.counts td:last-child { color: var(--faint); }
.counts svg { margin-top: 3px; }
.heats th, .heats td { border: 0; padding: 2px; text-align: center; vertical-align: middle; }
.heats td:first-child { font-size: .86rem; text-align: left; padding-right: 8px; }
.heat { border-radius: 6px; padding: 9px 4px; background: #f5f7fa; }
.strips td { vertical-align: middle; padding: 5px 8px; }
.strips th { padding: 5px 8px; }
.strips td:first-child { line-height: 1.25; }
.strips td + td, .strips th + th { white-space: nowrap; }
.strips th:nth-child(2), .strips td:nth-child(2) { width: 45%; text-align: center; }
.strip { position: relative; height: 14px; border-radius: 7px; margin: 0 7px;
  background: linear-gradient(#fff 6px, var(--line) 6px, var(--line) 8px, #fff 8px); }
.strip i { position: absolute; top: 0; width: 14px; height: 14px; margin-left: -7px;
  border-radius: 50%; border: 2px solid #fff; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--tuned); font-size: .86rem; }
pre { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 12px;
  overflow-x: auto; font-size: .78rem; line-height: 1.45; }
svg { width: 100%; height: auto; display: block; }
ul { padding-left: 1.2em; margin: 6px 0; }
@media (max-width: 480px) {
  .strips td, .strips th { padding: 5px 3px; font-size: .8rem; }
  .strips th:nth-child(2), .strips td:nth-child(2) { width: 35%; }
  .strips th:nth-child(3), .strips td:nth-child(3) { display: none; }
  h2 { margin-top: 36px; }
  .card { padding: 12px; }
  th, td { padding: 7px 3px; }
  td small { font-size: .67rem; letter-spacing: -.02em; }
  .headline tr { display: grid; grid-template-columns: 1fr 1fr 1.3fr 1fr;
    padding: 6px 0;
    border-bottom: 1px solid var(--line); }
  .headline tr:last-child { border-bottom: 0; }
  .headline td, .headline th { border: 0; padding: 2px 0; font-size: .9rem; }
  .headline td:first-child, .headline th:first-child { grid-column: 1 / -1; }
  .headline th:first-child:empty { display: none; }
}
@media print { .card { break-inside: avoid; } body { background: #fff; } }
"""


def escape(text) -> str:
    """Text as HTML that shows it, wherever it came from."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str) -> str:
    """A whole document, without scripts and without references to anything outside it."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A heading, a line that says how to read what follows, and the HTML `body`."""
    note = f'<p class="faint">{note}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{note}\n{body}\n</section>\n"


def cards(items, *, small: bool = False) -> str:
    """Boxes of HTML in a grid of as many columns as fit; empty ones are left out."""
    inner = "\n".join(f'<div class="card">{item}</div>' for item in items if item)
    return f'<div class="cards{" small-cards" if small else ""}">\n{inner}\n</div>' if inner else ""


def table(header, rows, *, css: str = "") -> str:
    """A table; body cells are HTML. css "answers" is small, "headline" folds up on a phone."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{css}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def image(png: bytes, alt: str, *, max_side: int = 192, photo: bool = False) -> str:
    """An <img> that holds its picture: shrunk when larger, with hard pixels when below 128 px.

    What is not below 128 px is kept as a JPEG where `photo` says so, a fifth of a PNG.
    """
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    is_small = max(picture.size) < 128
    picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    stream, kind = io.BytesIO(), "jpeg" if photo and not is_small else "png"
    picture.save(stream, kind, optimize=True, quality=90)
    uri = f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    width, height = picture.size
    crisp = ' class="crisp"' if is_small else ""
    return f'<img{crisp} src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'


def figures(caption: str, sides, below: str = "") -> str:
    """Images of one prompt side by side, two or, of more, up to four in a row.

    Args:
        caption: escaped here.
        sides: (name, HTML of the image, HTML below it) each; the name's first word is its class:
            base, tuned, chosen, rejected, best, worst.
        below: HTML under all of them.
    """
    shown = "".join(
        f'<figure class="{escape(name.split()[0])}">{picture}'
        f"<figcaption><b>{escape(name)}</b>{text}</figcaption></figure>"
        for name, picture, text in sides
    )
    css = "duo" if len(sides) == 2 else "quartet"
    return f'<p class="caption">{escape(caption)}</p><div class="{css}">{shown}</div>{below}'


def contact_sheet(groups: list, *, columns: int = 4, tile: int = 128) -> Image.Image:
    """Base beside tuned, for a README: one PNG of small cards under headings.

    Args:
        groups: [(heading, [(caption, (base PNG, a line below), (tuned PNG, a line below))])].
        tile: side of one picture in pixels; smaller ones grow with hard pixels.
    """
    pad, gap, top, foot = 16, 18, 42, 36
    width, height = 2 * tile + 4, top + tile + foot
    groups = [(heading, items) for heading, items in groups if items]
    rows = [-(-len(items) // columns) for _, items in groups]
    sheet = Image.new(
        "RGB",
        (2 * pad + columns * (width + gap) - gap, 2 * pad + sum(26 + height * n for n in rows)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    large, font, small = (ImageFont.load_default(size) for size in (17, 14, 13))
    y = pad
    for (heading, items), count in zip(groups, rows, strict=True):
        draw.text((pad, y), heading, fill="#1c2330", font=large)
        y += 26
        for i, (caption, base, tuned) in enumerate(items):
            left, above = pad + i % columns * (width + gap), y + i // columns * height
            lines = _wrap(draw, caption, font, width)
            for k, line in enumerate(reversed(lines)):
                draw.text((left, above + top - 20 - 17 * k), line, fill="#1c2330", font=font)
            for (png, note), color in ((base, "#5b6575"), (tuned, "#2457d6")):
                picture = _fit(Image.open(io.BytesIO(png)).convert("RGB"), tile)
                sheet.paste(picture, (left, above + top))
                draw.text((left, above + top + tile + 3), note, fill=color, font=small)
                left += tile + 4
        y += count * height
    return sheet


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """The picture at `side` pixels along its longer side."""
    scale = side / max(picture.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize(tuple(max(1, round(length * scale)) for length in picture.size), method)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> list[str]:
    """The text in at most two lines; what does not fit ends in an ellipsis."""
    first, words = "", text.split()
    while words and (not first or draw.textlength(f"{first} {words[0]}", font=font) <= width):
        first = f"{first} {words.pop(0)}".strip()
    lines = [first, " ".join(words)] if words else [first]
    return [_cut(draw, line, font, width) for line in lines]


def _cut(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."
