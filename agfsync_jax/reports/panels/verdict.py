"""What the comparison of base and tuned model says, in plain words."""

from agfsync_jax.reports import formats
from agfsync_jax.reports.panels import Panel
from agfsync_jax.reports.rounds import Report


def verdict(report: Report) -> tuple[str, list[str]]:
    """The first of the independent judges decides; without any, nobody does.

    Returns:
        "good", "bad", "warn" or "" (undecided), and sentences, the first of which is a headline.
    """
    last, columns = report.last, report.columns
    if not last.delta:
        return "", ["No evaluation yet: nothing can be said about the tuned model."]

    def tell(name: str) -> str:
        before, after = (formats.value(columns[name], m[name]) for m in (last.base, last.tuned))
        change = formats.change(columns[name], last.delta[name])
        return f"{before.text} → {after.text}, {change.text} (95% interval {change.ends})"

    def about(name: str) -> str:
        text = columns[name].about or name
        return f"{text[:1].upper()}{text[1:]}: {tell(name)}."

    says = {name: formats.direction(columns[name], last.delta[name]) for name in columns}
    rounds = f"After {formats.count(len(report.judged), 'round')}"
    scorers = [name for name in columns if name not in report.judges]
    if not report.judges:
        scorer = scorers[0]
        head = {"better": "improves", "worse": "gets worse", "": "does not clearly change"}
        return "bad" if says[scorer] == "worse" else "", [
            f"{rounds} {scorer} {head[says[scorer]]} on held-out prompts.",
            about(scorer),
            "No independent judge looks at these prompts, and the model was trained to please its "
            "scorers: look at the pictures before believing them.",
        ]
    judge = report.judges[0]
    css, head = {
        "better": ("good", "the tuned model better than the base"),
        "worse": ("bad", "the tuned model worse than the base"),
        "": ("", "no clear difference between the tuned model and the base"),
    }[says[judge]]
    sentences = [
        f"{rounds} the {judge}, an independent judge, finds {head} on held-out prompts.",
        " ".join(about(name) for name in report.judges),
    ]
    if scorers and says[scorers[0]] == "better" and says[judge] != "better":
        css = css or "warn"
        sentences.append(
            f"Warning: the {scorers[0]} score improves, {tell(scorers[0])}, but the independent "
            f"{judge} does not. The model may have learned to please its scorer and not to follow "
            "prompts: do not take the better score for better pictures."
        )
    elif scorers:
        sentences.append(f"The {scorers[0]} score: {tell(scorers[0])}.")
    for name in scorers[1:]:
        if says[name] == "worse":
            sentences.append(f"The {name} score gets worse: {tell(name)}.")
    return css, sentences


def show(report: Report) -> dict:
    says, sentences = verdict(report)
    return {"says": says, "sentences": sentences}


PANEL = Panel("report", 10, show, template="{{ m.verdict(says, sentences) }}")
