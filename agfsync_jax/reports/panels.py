"""The panels of the report: plain rows in, HTML out.

Rows are dicts as the verbs write them: score rows {"prompt_id", "candidate", column: number},
answer rows {"prompt_id", "candidate", "question", "element_type", "expected", "answer", "correct"},
intervals {"mean", "low", "high"}. All text of prompts, questions and answers is escaped here.
"""

import functools
import math
from collections import defaultdict

import numpy as np

from agfsync_jax.reports import charts, pages
from agfsync_jax.utils.statistics import bootstrap

# name -> (what it is, its format); "%" is a share between 0 and 1.
METRICS = {
    "referee": ("checks that an independent vision program, never used to train, finds true", "%"),
    "referee_strict": ("images in which the referee finds every check true", "%"),
    "vqa": ("questions about the image that the VQA model answers as the prompt expects", "%"),
    "clip": ("similarity of image and prompt: 100 x cosine of their CLIP embeddings", ".2f"),
    "aesthetic": (
        "how good the image looks whatever the prompt, by the aesthetic predictor",
        ".3f",
    ),
}
# pair.json: of what, and what became of it
COUNTED = {
    "pairs": ("pairs", "kept"),
    "ties": ("pairs", "without a difference"),
    "margin": ("pairs", "below the smallest margin"),
    "limit": ("pairs", "beyond the limit a prompt"),
    "few_questions": ("prompts", "with too few questions"),
    "too_few": ("prompts", "with less than two images that count"),
    "unanswered": ("images", "with a question that has no answer"),
    "nonfinite": ("images", "with a score that is not finite"),
    "unlabelled": ("rows", "without a label"),
    "empty_captions": ("rows", "without a caption"),
    "bad_images": ("rows", "with an image that cannot be decoded"),
}
KEYS = ("prompt_id", "candidate", "seed")


def in_order(metrics) -> list[str]:
    """Names of metrics, the known ones first."""
    return [name for name in METRICS if name in metrics] + sorted(set(metrics) - set(METRICS))


def metric_names(rows: list[dict]) -> list[str]:
    """The score columns of rows, without the parts ("a/b") of another column ("a")."""
    found = {name for row in rows for name in row} - set(KEYS)
    return in_order([n for n in found if "/" not in n or n.split("/")[0] not in found])


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """A value as text: "81.4%", or a difference: "+1.6 pt" for shares."""
    kind = METRICS.get(metric, ("", ".3f"))[1]
    sign = "+" if signed else ""
    if kind == "%":
        text = "100%" if value == 1 and not signed else f"{100 * value:{sign}.1f}"
        text += " pt" if signed else "%" * (text[-1] != "%")
    else:
        text = f"{value:{sign}{kind}}"
    return text.replace("-", "−")


def between(metric: str, interval: dict, *, signed: bool = False) -> str:
    """The ends of an interval: "80.6 – 82.3", signed: "+0.6 to +2.6"."""
    low, high = (number(metric, interval[end], signed=signed) for end in ("low", "high"))
    cut = " pt" if signed else "%"
    return f"{low.removesuffix(cut)} {'to' if signed else '–'} {high.removesuffix(cut)}"


def axis(metric: str):
    """How the ticks of an axis of this metric are written."""
    return charts.percent if METRICS.get(metric, ("", ""))[1] == "%" else charts.number


def direction(interval: dict, zero: float = 0.0) -> str:
    """ "up" or "down" where the 95% interval leaves out `zero`, else ""."""
    return "up" if interval["low"] > zero else "down" if interval["high"] < zero else ""


def title(name: str, num_rounds: int, device: str) -> str:
    """The head of the page."""
    rounds = "1 round" if num_rounds == 1 else f"{num_rounds} rounds"
    line = " · ".join(pages.escape(text) for text in (name, rounds, device))
    return f'<h1>AGFSync report</h1><p class="faint">{line}</p>'


def verdict_card(css: str, sentences: list[str]) -> str:
    """The first sentence large, in a box of the color of `css`: good, bad, warn or none."""
    text = "".join(f"<p>{pages.escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="card verdict {css}">{text}</div>'


def missing(parts: dict[str, list[str]]) -> str:
    """What a workdir does not hold yet, {round: [part]}."""
    if not parts:
        return ""
    lines = "".join(
        f"<li>{pages.escape(label)}: {pages.escape(', '.join(names))}</li>"
        for label, names in parts.items()
    )
    return f'<div class="card"><b>Not there yet</b><ul>{lines}</ul></div>'


def headline(base: dict, tuned: dict, delta: dict, win_rate: dict, images: list[dict]) -> str:
    """The table of all metrics: values, change and win rate, each over its 95% interval."""
    if not delta:
        return ""
    rows = []
    for metric in in_order(delta):
        about = METRICS.get(metric, ("",))[0]
        cells = [f"<b>{pages.escape(metric)}</b><small>{about}</small>"]
        for values in (base, tuned):
            ends = between(metric, values[metric])
            cells.append(f"{number(metric, values[metric]['mean'])}<small>{ends}</small>")
        for text, ends, way in (
            (
                number(metric, delta[metric]["mean"], signed=True),
                between(metric, delta[metric], signed=True),
                direction(delta[metric]),
            ),
            (
                charts.percent(round(win_rate[metric]["mean"], 3)),
                between("vqa", win_rate[metric]),
                direction(win_rate[metric], 0.5),
            ),
        ):
            arrow = {"up": " ▲", "down": " ▼", "": ""}[way]
            cells.append(f'<span class="{way}">{text}{arrow}</span><small>{ends}</small>')
        rows.append(cells)
    prompts = len({row["prompt_id"] for row in images})
    table = pages.table(("", "Base", "Tuned", "Change", "Win rate"), rows, css="headline")
    return (
        f'<div class="card">{table}</div><p class="note">{prompts} prompts that training '
        f"never saw, {len(images)} images a model, the same seeds for both. Small figures are 95% "
        "intervals from a paired bootstrap over prompts, colored where they exclude no change. Win "
        "rate: how often the tuned image beats the base image of its prompt and seed, a tie "
        "counting half.</p>"
    )


def answer_table(
    first: list[dict],
    second: list[dict],
    names: tuple[str, str] = ("base", "tuned"),
    shown: int = 6,
) -> str:
    """Every question of a prompt, with the answer expected, and what was said of its two images.

    A tick, or a cross and the wrong answer. Questions on which the two differ come first, then
    wrong ones; what exceeds `shown` is folded.
    """

    def mark(row: dict) -> str:
        if row["answer"] is None:
            return '<span class="faint">no answer</span>'
        if row["correct"]:
            return '<span class="yes">✓</span>'
        return f'<span class="no">✗</span> {pages.escape(row["answer"])}'

    def ask(row: dict) -> str:
        expected = pages.escape(row["expected"])
        return f'{pages.escape(row["question"])} <span class="faint">{expected}</span>'

    def rank(both: tuple[dict, dict]) -> tuple[bool, bool]:
        one, other = (bool(row["correct"]) for row in both)
        return one == other, other

    pairs = sorted(zip(first, second, strict=True), key=rank)
    rows = [(ask(a), mark(a), mark(b)) for a, b in pairs]
    if not rows:
        return ""
    header = ("question and answer", *names)
    text = pages.table(header, rows[:shown], css="answers")
    if rows[shown:]:
        rest = pages.table(header, rows[shown:], css="answers")
        text += f"<details><summary>{len(rows) - shown} more</summary>{rest}</details>"
    return text


def before_and_after(groups: dict[str, list[dict]]) -> str:
    """The image grids, {heading: [{"prompt", "base", "tuned"}]}.

    "base" and "tuned" are {"png": bytes, "scores": score row, "answers": answer rows}.
    """
    body = "\n".join(
        f"<h3>{pages.escape(heading)}</h3>{_picture_cards(examples)}"
        for heading, examples in groups.items()
        if examples
    )
    note = (
        "Same prompt, same seed, base beside tuned, with the VQA model's answer to each question. "
        "The random sample is fixed by the seed of the run, not picked by hand."
    )
    return pages.section("Before and after", body, note) if body else ""


def _picture_cards(examples: list[dict]) -> str:
    items = []
    for example in examples:
        sides = []
        for name in ("base", "tuned"):
            side = example[name]
            right = [bool(row["correct"]) for row in side["answers"]]
            lines = [f"answers {sum(right)}/{len(right)}"] if right else []
            lines += [
                f"{pages.escape(metric)} {number(metric, side['scores'][metric])}"
                for metric in metric_names([side["scores"]])
                if metric not in ("referee_strict", "vqa") or (metric == "vqa" and not right)
            ]
            picture = pages.image(side["png"], f"{name}: {example['prompt']}")
            sides.append((name, picture, "<br>".join(lines)))
        answers = answer_table(example["base"]["answers"], example["tuned"]["answers"])
        items.append(pages.figures(example["prompt"], sides, answers))
    return pages.cards(items, small=True)


def elements(rows: dict[str, list[dict]], answers: dict[str, list[dict]]) -> str:
    """Accuracy by element type, base against tuned: of the VQA answers and of the referee."""
    by_type: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for model, asked in answers.items():
        for row in asked:
            by_type[row["element_type"]][model].append((float(row["correct"]), row["prompt_id"]))
    checks: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for model, scored in rows.items():
        for row in scored:
            for name, value in row.items():
                if name.startswith("referee/") and value is not None and math.isfinite(value):
                    checks[name.removeprefix("referee/")][model].append((value, row["prompt_id"]))

    def chart(title: str, table: dict) -> str:
        lines = []
        for element, models in sorted(table.items()):
            points = {}
            for model, pairs in models.items():
                values, prompts = zip(*pairs, strict=True)
                points[model] = tuple(bootstrap(values, np.array(prompts)).values())
            lines.append((element, points))
        return charts.dot_chart(title, lines, value_format=functools.partial(number, "vqa"))

    body = pages.cards(
        [chart("VQA answers right", by_type), chart("Referee's checks true", checks)]
    )
    note = "Base → tuned on the held-out prompts; bars are 95% intervals."
    return pages.section("What it gets right", body, note) if body else ""


def distributions(base: list[dict], tuned: list[dict]) -> str:
    """A histogram a metric, before and after; a share of yes or no alone says nothing here."""
    items = []
    for metric in metric_names(base):
        if metric != "referee_strict":
            groups = {
                name: [row[metric] for row in rows if metric in row]
                for name, rows in (("base", base), ("tuned", tuned))
            }
            chart = charts.histogram(
                metric,
                groups,
                x_format=axis(metric),
                mean_format=functools.partial(number, metric),
            )
            items.append(chart)
    body = pages.cards(items)
    note = "Share of the held-out images at each score."
    return pages.section("Scores before and after", body, note) if body else ""


def training(rounds: dict[str, list[dict]]) -> str:
    """Loss, margin and accuracy over the steps, a line a round."""
    items = []
    for name, reference in (
        ("loss", (math.log(2), "ln 2: no preference yet")),
        ("rewards/margin", (0.0, "no preference")),
        ("rewards/accuracy", (0.5, "chance")),
    ):
        series = {}
        for label, rows in rounds.items():
            rows = [row for row in rows if name in row]
            series[label] = ([row["step"] for row in rows], [row[name] for row in rows])
        longest = max((len(steps) for steps, _ in series.values()), default=0)
        form = charts.percent if name == "rewards/accuracy" else charts.number
        items.append(
            charts.line_chart(
                name,
                {label: line for label, line in series.items() if line[0]},
                x_label="step",
                y_format=form,
                # The loss of SFT has no such level.
                reference=reference if name != "loss" or _is_preference(rounds) else None,
                smooth=max(1, longest // 20),
            )
        )
    last = {
        name: (
            [row["step"] for row in rows if name in row],
            [row[name] for row in rows if name in row],
        )
        for rows in list(rounds.values())[-1:]
        for name in ("rewards/chosen", "rewards/rejected")
    }
    title = f"rewards, {list(rounds)[-1]}" if rounds else ""
    items.append(charts.line_chart(title, last, x_label="step", smooth=max(1, longest // 20)))
    body = pages.cards(items)
    note = (
        "Pale: every logged step; bold: the moving average. Accuracy is the share of pairs whose "
        "chosen image the policy prefers more than the reference does. A reward below 0: the "
        "policy finds that image less likely than the reference does."
    )
    return pages.section("Training", body, note) if body else ""


def _is_preference(rounds: dict[str, list[dict]]) -> bool:
    return any("rewards/margin" in row for rows in rounds.values() for row in rows[:1])


def pairs(groups: dict[str, list[dict]], counts: dict, label: str) -> str:
    """Chosen beside rejected with every score, {heading: pairs}; `counts` is pair.json."""
    body = "\n".join(
        f"<h3>{pages.escape(heading)}</h3>{_pair_cards(found)}"
        for heading, found in groups.items()
        if found
    )
    if not body:
        return ""
    told = [f"{counts[key]:,} {' '.join(text)}" for key, text in COUNTED.items() if counts.get(key)]
    note = f"Of {pages.escape(label)}. " + (f"{'; '.join(told)}." if told else "")
    return pages.section("What it learned from", body, note)


def _pair_cards(found: list[dict]) -> str:
    items = []
    for pair in found:
        sides = []
        for name in ("chosen", "rejected"):
            scores = pair[f"{name}_scores"]
            lines = [
                f"{pages.escape(metric)} {number(metric, scores[metric])}"
                for metric in metric_names([scores])
            ]
            lines.append(f"total {pair[f'{name}_score']:.3g}".replace("-", "−"))
            picture = pages.image(pair[f"{name}_image"], f"{name}: {pair['prompt']}")
            sides.append((name, picture, "<br>".join(lines)))
        items.append(pages.figures(pair["prompt"], sides))
    return pages.cards(items, small=True)


def round_by_round(base: dict, rounds: dict) -> str:
    """Each metric from the base through every round; {label: round with tuned, delta, counts}."""
    if len(rounds) < 2:
        return ""
    states = {"base": base} | {label: r.tuned for label, r in rounds.items()}
    names = in_order(base)
    curves, rows = [], []
    for metric in names:
        means, lows, highs = ([v[metric][e] for v in states.values()] for e in base[metric])
        curves.append(
            charts.line_chart(
                metric,
                {metric: (range(len(states)), means)},
                bands={metric: (lows, highs)},
                x_labels=list(states),
                y_format=axis(metric),
            )
        )
    for metric in names:
        cells = [f"<b>{pages.escape(metric)}</b>"]
        for r in rounds.values():
            change = number(metric, r.delta[metric]["mean"], signed=True)
            ends = between(metric, r.delta[metric], signed=True)
            way = direction(r.delta[metric])
            cells.append(f'<span class="{way}">{change}</span><small>{ends}</small>')
        rows.append(cells)
    rows.append(["pairs", *(f"{r.counts.get('pairs', '–')}" for r in rounds.values())])
    table = pages.table(("change from the base", *rounds), rows)
    note = (
        "Each round draws, scores and trains anew, starting from the last policy. Changes are from "
        "the base; bands are 95% intervals."
    )
    body = f'<div class="card scroll">{table}</div>{pages.cards(curves)}'
    return pages.section("Round by round", body, note)


def costs(rounds: dict[str, dict[str, dict]]) -> str:
    """Seconds, items and rate of every stage, {round: stages.json}, a table a round."""
    items = [f"<h3>{pages.escape(label)}</h3>{_cost_table(s)}" for label, s in rounds.items()]
    return pages.section("What it cost", pages.cards(items)) if items else ""


def setting(config: str, versions: dict[str, str]) -> str:
    """The config as JSON, folded, and the versions of what ran."""
    names = " · ".join(f"{pages.escape(n)} {pages.escape(v)}" for n, v in versions.items())
    body = f'<p class="note">{names}</p>'
    if config:
        shown = f"<pre>{pages.escape(config)}</pre>"
        body = f"<details><summary>The whole config</summary>{shown}</details>{body}"
    return pages.section("Setting", body)


def _cost_table(stages: dict[str, dict]) -> str:
    total = sum(stage["seconds"] for stage in stages.values()) or 1.0
    rows = []
    for verb, stage in stages.items():
        share = stage["seconds"] / total
        speed = stage["items_per_second"]
        rate = (f"{speed:,.0f}/s" if speed >= 100 else f"{speed:.3g}/s") if stage["items"] else "–"
        items = f"{stage['items']:,}"
        rows.append((f"{pages.escape(verb)}{bar(share)}", duration(stage["seconds"]), items, rate))
    rows.append(("<b>all</b>", f"<b>{duration(total)}</b>", "", ""))
    return pages.table(("Stage", "Time", "Items", "Rate"), rows)


def bar(share: float, color: str = charts.COLORS[1]) -> str:
    """A bar of this part of the width that is there, from 0 to 1."""
    return (
        f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" style="height:8px" '
        f'aria-hidden="true"><rect width="{100 * share:.1f}" height="8" rx="2" '
        f'fill="{color}"/></svg>'
    )


def duration(seconds: float) -> str:
    """ "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )
