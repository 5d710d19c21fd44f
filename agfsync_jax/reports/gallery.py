"""The panels of the gallery of pairs: what `data.gallery.read_gallery` gives in, HTML out.

All text of prompts, questions, answers and settings is escaped here.
"""

from types import SimpleNamespace

import numpy as np

from agfsync_jax.reports import charts, findings, pages, panels, tallies

ALL, CHOSEN, REJECTED = "#c3cad6", "#0b7a4b", "#b3261e"  # as the page colors the words
EQUAL = "#98a2b3"
ELEMENTS = 14  # kinds of question shown; the rest is taken together


def title(name: str, label: str) -> str:
    """The head of the page."""
    line = f"{pages.escape(name)} · {pages.escape(label)}"
    return f'<h1>AGFSync pairs</h1><p class="faint">{line}</p>'


def headline(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """What these pairs are, in words, and what looks odd about them."""
    pairs = "ranking" if source.is_ranked else "pair"
    of = f"{told.num_prompts:,}"
    if told.total:
        share = charts.percent(round(told.num_prompts / told.total, 2))
        of += f" of {told.total:,} prompts ({share} gave one)"
    else:
        of += " prompts"
    sentences = [f"{findings.count(told.num_pairs, pairs)} from {of}.", findings.how(source, told)]
    found = findings.warnings(source, told)
    if not source.is_import and source.columns and not found:
        sentences.append(
            "Nothing looks odd: most prompts gave a pair, no score decides alone or goes against "
            "the pairs, each tells the images of a prompt apart, no two contradict each other, and "
            "no candidate number clearly wins or loses."
        )
    sentences += [f"Look at this: {sentence}" for sentence in found]
    return panels.verdict_card("warn" if found else "good", sentences)


def dropped(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """What was kept, and what was not for which reason, of prompts, pairs, images; and who wins."""
    units = _by_unit(source, told)
    names = {"pairs": "rankings looked at" if source.is_ranked else "pairs looked at"}
    if source.is_import:
        names["pairs"] = "rows of the preference set"
    items = {
        unit: _counts_card(f"{sum(n for _, n, _ in rows):,} {names.get(unit, unit)}", rows)
        for unit, rows in units.items()
        if rows
    }
    if source.scoring:
        items["images"] = items.get("images", "") + _left_out(source.scoring)
    note = "Each thing that was dropped is counted once, under the first reason that holds."
    if not source.is_import:
        note += (
            " For more or other pairs, change config.pair and run agfsync pair again: nothing is "
            "drawn or scored anew."
        )
    body = pages.cards([*items.values(), wins_chart(source, told)], small=True)
    return pages.section("What was kept, and what was dropped", body, note)


def _by_unit(source: SimpleNamespace, told: SimpleNamespace) -> dict[str, list[tuple]]:
    """{unit: [(what became of them, how many, color)]}, those kept first."""
    units: dict[str, list] = {"prompts": [], "pairs": [], "images": [], "other counts": []}
    for key, value in source.counts.items():
        if key == "prompts" or not isinstance(value, int) or not value:
            continue
        unit, text = panels.COUNTED.get(key, ("other counts", key))
        unit = "pairs" if unit == "rows" else unit
        units[unit].append((text, value, CHOSEN if key == "pairs" else ALL))
    if told.total and not source.is_import:
        rest = told.total - told.num_prompts - sum(value for _, value, _ in units["prompts"])
        units["prompts"].insert(0, ("that gave one or more", told.num_prompts, CHOSEN))
        if rest > 0:
            text = "whose images are alike, or too close to each other"
            units["prompts"].append((text, rest, ALL))
    scored = len(source.prompts)
    if scored:
        left = scored - sum(value for _, value, _ in units["images"])
        units["images"].insert(0, ("with all scores", left, CHOSEN))
        if (lost := source.scoring.get("images", scored) - scored) > 0:
            units["images"].append(("that could not be read", lost, ALL))
    return units


def _counts_card(heading: str, rows: list[tuple[str, int, str]]) -> str:
    total = sum(value for _, value, _ in rows)
    cells = [
        (
            f"{pages.escape(text)}{panels.bar(value / total, color)}",
            f"{value:,}",
            charts.percent(round(value / total, 2)),
        )
        for text, value, color in rows
    ]
    return f"<h3>{pages.escape(heading)}</h3>{pages.table((), cells, css='counts')}"


def _left_out(scoring: dict) -> str:
    """What `agfsync score` left out, in its own words, with examples folded."""
    told: list[tuple[str, list[str]]] = []
    for line in scoring.get("left_out", []):
        if line.startswith("left out: "):
            told.append((line.removeprefix("left out: "), []))
        elif told:
            told[-1][1].append(line)
    if not told:
        return '<p class="note">Scoring left nothing out.</p>'
    text = '<p class="note">Scoring left out:</p>'
    for head, examples in told:
        inner = "".join(f"<li>{pages.escape(line)}</li>" for line in examples)
        head = f"<summary>{pages.escape(head)}</summary>"
        text += f'<details class="note">{head}<ul>{inner}</ul></details>'
    return text


def wins_chart(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """How often the candidate of each number is chosen and rejected."""
    won, lost = _names(source)
    title, labels = "Pairs by candidate number", [str(number) for number in told.wins]
    if source.is_ranked:
        title = "Rankings by candidate number"
    if source.is_import:
        title, labels = "Pairs by image of a row", [findings.IMAGES[n] for n in told.wins]
    chart = charts.bar_chart(
        title,
        labels,
        {
            won: [wins.chosen for wins in told.wins.values()],
            lost: [wins.rejected for wins in told.wins.values()],
        },
        colors=(CHOSEN, REJECTED),
    )
    note = "Where both bars are about as high, the number has no part in who wins."
    return f'{chart}<p class="note">{note}</p>'


def _names(source: SimpleNamespace) -> tuple[str, str]:
    """What the two sides of a pair are called."""
    return ("best", "worst") if source.is_ranked else ("chosen", "rejected")


def distributions(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """A histogram a score, of all images and of those in pairs; of the margin; and the spread."""
    names = _names(source)
    items = []
    for column, values in source.columns.items():
        chart = charts.histogram(
            column,
            {"all": values, names[0]: source.chosen[column], names[1]: source.rejected[column]},
            bins=20,
            x_format=panels.axis(column),
            mean_format=lambda mean, column=column: panels.number(column, mean),
            colors=(ALL, CHOSEN, REJECTED),
            outlined=names,
        )
        items.append(chart)
    items.append(
        charts.histogram(
            "margin: how far apart the totals are",
            {"all pairs": source.pairs.margin},
            bins=20,
            mean_format=lambda mean: panels.number("", mean),
            colors=("#2457d6",),
        )
        if np.ptp(source.pairs.margin)
        else ""
    )
    items.append(_spread_card(told.spreads))
    body = pages.cards(items)
    note = (
        "Share of the images at each score; the figures beside the names are means. Good pairs "
        "lie apart: where the two lines are one, the score had no say."
        if source.columns
        else ""
    )
    return pages.section("Scores", body, note) if body else ""


def _spread_card(spreads: dict[str, tallies.Spread]) -> str:
    """Within prompts against overall, a row a score."""
    rows = []
    for column, spread in spreads.items():
        if np.isfinite(spread.share):
            sizes = [
                panels.number(column, size, signed=True).removeprefix("+")
                for size in (spread.within, spread.overall)
            ]
            share = charts.percent(round(spread.share, 2))
            bar = panels.bar(min(spread.share, 1), charts.COLORS[1])
            rows.append((f"{pages.escape(column)}: {share}{bar}", *sizes))
    if not rows:
        return ""
    note = (
        "Standard deviation within a prompt and over all images. A score that is the same for all "
        "images of a prompt cannot choose between them."
    )
    table = pages.table(("", "within", "overall"), rows, css="counts")
    return f'<h3>Do scores differ within a prompt?</h3>{table}<p class="note">{note}</p>'


def correlations(source: SimpleNamespace, told: SimpleNamespace) -> str:
    """Which scores order images alike, over all images and within prompts; and with the pairs."""
    names = list(source.columns)
    items = []
    if len(names) > 1:
        for heading, prompts in (
            ("Correlation over all images", None),
            ("Correlation within prompts", source.prompts),
        ):
            matrix = tallies.correlations(list(source.columns.values()), prompts)
            items.append(f"<h3>{heading}</h3>{_heat_table(names, matrix)}")
    better = "best image" if source.is_ranked else "chosen image"
    rows = [
        (
            name if source.signs[name] > 0 else f"{name} (lower is better)",
            dict(zip(("better", "equal", "worse"), shares, strict=True)),
        )
        for name, shares in told.agreement.items()
        if np.isfinite(shares).all()
    ]
    items.append(
        charts.share_chart(
            f"By each score, the {better} is", rows, colors=(CHOSEN, EQUAL, REJECTED)
        )
    )
    body = pages.cards(items)
    note = (
        "1: both scores order images alike; 0: they have nothing to do with each other; −1: they "
        "order them the other way round. Only what is left within prompts can make a pair."
        if len(names) > 1
        else ""
    )
    return pages.section("Do the scores agree?", body, note) if body else ""


def _heat_table(names: list[str], matrix: np.ndarray) -> str:
    """The lower half of a matrix of correlations, blue above 0 and orange below."""
    rows = []
    for i, name in enumerate(names[1:], 1):
        cells = [pages.escape(name)]
        for value in matrix[i, :i]:
            if np.isnan(value):
                cells.append('<div class="heat">–</div>')
                continue
            color = "36, 87, 214" if value > 0 else "217, 115, 13"
            text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")
            style = f"background: rgba({color}, {0.75 * abs(value):.2f})"
            cells.append(f'<div class="heat" style="{style}">{text}</div>')
        rows.append(cells + [""] * (len(names) - 1 - i))
    return f'<div class="scroll">{pages.table(("", *names[:-1]), rows, css="heats")}</div>'


def answers(source: SimpleNamespace) -> str:
    """What share of the answers is right, by kind of question: of all, chosen, rejected images."""
    items = []
    for scorer, kinds in source.answers.items():
        head = f"<h3>{pages.escape(scorer)}</h3>" if len(source.answers) > 1 else ""
        items.append(f'<div class="card">{head}{_answers_table(source, kinds)}</div>')
    note = (
        "Answers as the prompt expects them, by what the question is about; what could not be "
        "answered is left out, and an image counts as often as it is in a pair. Where the chosen "
        "images are far to the right of the rejected ones, the pairs teach that kind of thing."
    )
    return pages.section("Answers", "\n".join(items), note) if items else ""


def _answers_table(source: SimpleNamespace, kinds: dict[str, dict[str, np.ndarray]]) -> str:
    most = sorted(kinds, key=lambda kind: -kinds[kind]["all"][1])
    shown = {kind: kinds[kind] for kind in most[: ELEMENTS if len(most) > ELEMENTS + 1 else None]}
    if rest := most[len(shown) :]:
        shown[f"{len(rest)} other kinds"] = {
            side: sum(kinds[kind][side] for kind in rest) for side in ("all", "chosen", "rejected")
        }
    sides = {"all": ALL, "rejected": REJECTED, "chosen": CHOSEN}

    def shares(counts: dict) -> dict[str, float]:
        return {side: counts[side][0] / max(counts[side][1], 1) for side in sides}

    def gap(kind: str) -> float:
        found = shares(shown[kind])
        return found["chosen"] - found["rejected"]

    rows = []
    for kind in sorted(shown, key=gap, reverse=True):
        counts, found = shown[kind], shares(shown[kind])
        dots = "".join(
            f'<i style="left: {100 * found[side]:.1f}%; background: {color}"></i>'
            for side, color in sides.items()
            if counts[side][1]
        )
        numbers = [
            panels.number("vqa", found[side]) if counts[side][1] else "–"
            for side in ("all", "chosen", "rejected")
        ]
        numbers[1] = f'<span class="up">{numbers[1]}</span>'
        numbers[2] = f'<span class="down">{numbers[2]}</span>'
        label = f"{pages.escape(kind)}<small>{int(counts['all'][1]):,} answers</small>"
        rows.append((label, f'<div class="strip">{dots}</div>', *numbers))
    names = _names(source)
    return pages.table(("asked about", "0 to 100% right", "all", *names), rows, css="strips")


def examples(source: SimpleNamespace) -> str:
    """The pairs themselves: prompt, images, scores, answers, margin."""
    body, gone = "", 0
    about = {
        "A random sample": "fixed by the seed of the run, not picked by hand",
        "The largest margins": "what training sees most clearly",
        "The smallest margins": "would you have chosen the same?",
        "Where the scores disagree most": "one score is much for the chosen image, another against",
    }
    for heading, found in source.examples.items():
        if found:
            cards = pages.cards([_example_card(source, example) for example in found])
            body += f'<h3>{heading} <span class="faint">– {about[heading]}</span></h3>{cards}'
            gone += sum(side["png"] is None for example in found for side in example["sides"])
    note = ""
    if source.columns:
        note = (
            "Green: the better one by that score. Questions on which the two images differ first."
        )
    if gone:
        note += (
            f" <b>{findings.count(gone, 'image')} cannot be shown, as neither candidates/ nor "
            "pairs/ has them.</b> agfsync sample draws the same again; config.pair.images=True "
            "stores them with the pairs."
        )
    return pages.section("The pairs", body, note)


def _example_card(source: SimpleNamespace, example: dict) -> str:
    sides, prompt = example["sides"], example["prompt"]
    values = {
        name: [sign * side["scores"].get(name, np.nan) for side in sides]
        for name, sign in source.signs.items()
    }

    def mark(name: str, side: dict) -> str:
        value = side["scores"].get(name, np.nan)
        if np.isnan(value):
            return "–"
        text = panels.number(name, value)
        is_best = source.signs[name] * value == np.nanmax(values[name]) > np.nanmin(values[name])
        return f'<span class="up">{text}</span>' if is_best else text

    def total(side: dict) -> str:
        return f"{side['total']:.3g}".replace("-", "−")

    margin = f"margin {example['margin']:.3g}".replace("-", "−")
    won, lost = _names(source)
    names = (won, *map(str, range(2, len(sides))), lost)
    figures = []
    for name, side in zip(names, sides, strict=True):
        picture = '<div class="gone">no image</div>'
        if side["png"] is not None:
            picture = pages.image(side["png"], f"{name}: {prompt}", max_side=256, photo=True)
        number = side["candidate"]
        lines = [findings.IMAGES[number] if source.is_import else f"candidate {number}"]
        if not source.is_ranked:
            lines += [f"{pages.escape(n)} {mark(n, side)}" for n in source.columns]
            lines += [] if source.is_import else [f"total {total(side)}"]
        figures.append((name, picture, "<br>".join(lines)))
    below = "" if source.is_import else f'<p class="note">{margin}</p>'
    if source.is_ranked:
        rows = [
            (name, *(mark(n, side) for n in source.columns), total(side))
            for name, side in zip(names, sides, strict=True)
        ]
        header = ("place", *source.columns, "total")
        below = f'<div class="scroll">{pages.table(header, rows, css="answers")}</div>{below}'
    first, last = sides[0]["answers"], sides[-1]["answers"]
    if len(source.answers) > 1:
        first, last = (
            [row | {"question": f"{row['scorer']}: {row['question']}"} for row in rows]
            for rows in (first, last)
        )
    questions = panels.answer_table(first, last, (won, lost))
    below += f'<div class="wide-answers">{questions}</div>' if questions else ""
    return pages.figures(prompt, figures, below)
