"""What a bench found: each side's figures, their ratio, and a table of them in Markdown."""

import statistics

from agfsync_jax.benches import Task
from agfsync_jax.utils import flops


def figures(task: Task, sides: list[str], device: str) -> dict:
    """Each side's median speed and largest peak, and the ratio of speeds a pair of turns."""
    turns = {side: [row for row in task.rows if row["by"] == side] for side in sides}
    peak = flops.peak(device)

    def of_side(turns):
        def median(key):
            return statistics.median(row[key] for row in turns) if key in turns[0] else None

        seconds, step = median("seconds"), median("step_seconds")
        first = median("first_seconds")
        fastest = min(row["seconds"] for row in turns)
        return {
            "items_per_second": task.items / seconds,
            "seconds_per_step": step,
            "mfu": task.flop / seconds / peak if task.flop and peak else None,
            "peak_bytes": max(row["peak_bytes"] for row in turns),
            "compile_seconds": None if first is None else max(first - fastest, 0.0),
        }

    ours, *peers = (of_side(each) for each in turns.values())
    ratio = None
    if peers:
        pairs = zip(*turns.values(), strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"ours": ours, "peer": peers[0] if peers else None, "ratio": ratio}


def table(task: Task, result: dict, device: str, against: str | None = None) -> str:
    """Markdown: a row a side, and below it the ratio of their speeds."""
    columns = {
        "items_per_second": (f"{task.unit}/s", "{:.4g}"),
        "seconds_per_step": ("s/step", "{:.4g}"),
        "mfu": ("MFU", "{:.1%}"),
        "peak_bytes": ("peak GB", "{:.2f}"),
        "compile_seconds": ("compile s", "{:.1f}"),
    }
    sides = {
        name: side | {"peak_bytes": side["peak_bytes"] / 1e9}
        for name, side in (("agfsync", result["ours"]), (against, result["peer"]))
        if side
    }
    columns = {
        key: column
        for key, column in columns.items()
        if any(side[key] is not None for side in sides.values())
    }
    rows = [[device, *(head for head, _ in columns.values())], ["---"] * (1 + len(columns))]
    for name, side in sides.items():
        cells = [(side[key], form) for key, (_, form) in columns.items()]
        rows.append([name, *("" if v is None else form.format(v) for v, form in cells)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if ratio := result["ratio"]:
        lines += ["", "agfsync / {}: {median:.2f} times as fast ({min:.2f} to {max:.2f})"]
        lines[-1] = lines[-1].format(against, **ratio)
    head = [f"{task.name}:", ""] if task.name else []
    return "\n".join([*head, *lines, *task.notes, *([""] if task.name else [])])
