"""What a bench found: each side's figures, their ratio, and a table of them in Markdown."""

import statistics

from agfsync_jax.benches import Task
from agfsync_jax.utils import flops

# A figure -> its column's head, and a cell.
_COLUMNS = {
    "items_per_second": ("{unit}/s", "{:.4g}".format),
    "seconds_per_step": ("s/step", "{:.4g}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "peak_bytes": ("peak GB", lambda size: f"{size / 1e9:.2f}"),
    "compile_seconds": ("compile s", "{:.1f}".format),
}


def figures(task: Task, sides: list[str], device: str) -> dict:
    """Each side's median speed and largest peak, and the ratio of speeds a pair of turns."""
    turns = {side: [row for row in task.rows if row["by"] == side] for side in sides}
    peak = flops.peak(device)

    def of_side(turns):
        def median(key):
            return statistics.median(row[key] for row in turns) if key in turns[0] else None

        seconds, first = median("seconds"), median("first_seconds")
        fastest = min(row["seconds"] for row in turns)
        return {
            "items_per_second": task.items / seconds,
            "seconds_per_step": median("step_seconds"),
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
    sides = {"agfsync": result["ours"]} | ({against: result["peer"]} if result["peer"] else {})
    keys = [key for key in _COLUMNS if any(side[key] is not None for side in sides.values())]
    rows = [[device, *(_COLUMNS[key][0].format(unit=task.unit) for key in keys)]]
    rows.append(["---"] * len(rows[0]))
    for name, side in sides.items():
        rows.append([name, *("" if side[k] is None else _COLUMNS[k][1](side[k]) for k in keys)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if ratio := result["ratio"]:
        told = "agfsync / {}: {median:.2f} times as fast ({min:.2f} to {max:.2f})"
        lines += ["", told.format(against, **ratio)]
    lines += task.notes
    return "\n".join([f"{task.name}:", "", *lines, ""] if task.name else lines)
