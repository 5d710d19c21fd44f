"""How `agfsync plan` tells what it found: a table in Markdown, and what would help."""

from collections import Counter

import jax

from agfsync_jax.parallel.sharding import path_string
from agfsync_jax.plans import Work, param_bytes


def table(rows: list[dict]) -> str:
    """Markdown: a row a topology and verb."""
    columns = {
        "topology": lambda r: r["topology"],
        "verb": lambda r: r["verb"],
        "chips": lambda r: str(r["chips"]),
        "batch a chip": lambda r: str(r["batch_per_chip"]),
        "largest": lambda r: str(r["largest_batch_per_chip"]),
        "parameters": lambda r: gib(r["param_bytes"]),
        "optimizer": lambda r: gib(r["optimizer_bytes"]),
        "peak a chip": lambda r: f"{gib(r['bytes_per_chip'])} of {gib(r['hbm_bytes'])}",
        "fits": lambda r: {True: "yes", False: "NO", None: "?"}[r["fits"]],
        "TFLOP a step": lambda r: number(r["flops_per_step"], 1e12),
        "by formula": lambda r: number(r["analytic_flops_per_step"], 1e12),
        "collectives a step": _collectives,
        "ms a step": lambda r: number(r["step_seconds"], 1e-3),
        "bound by": lambda r: r["bound"] or "?",
        "MFU": lambda r: "?" if r["mfu"] is None else f"{r['mfu']:.0%}",
        "hours": lambda r: number(r["hours"], 1),
        "a second": lambda r: "?" if r["rate"] is None else f"{r['rate'][1]:.3g} {r['rate'][0]}",
    }
    for column, key in (("largest", "largest_batch_per_chip"), ("optimizer", "optimizer_bytes")):
        if not any(row[key] for row in rows):
            del columns[column]
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def too_large(row: dict, work: Work) -> list[str]:
    """What takes the memory, and what would help."""
    groups: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(work.params):
        names = [part for part in path_string(path).split(".") if not part.isdecimal()]
        groups[".".join(names[:2])] += param_bytes(leaf)
    told = ", ".join(f"{name} {gib(size)}" for name, size in groups.most_common(4))
    needed, rest, held = "too large", "", row["param_bytes"] + row["optimizer_bytes"]
    if peak := row["bytes_per_chip"]:
        needed = f"needs {gib(peak)} a chip"
        rest = (
            f"; activations and the rest, of a batch of {row['batch_per_chip']} a chip: "
            f"{gib(peak - held)}"
        )
    return [
        f"does not fit: {needed}, there are {gib(row['hbm_bytes'])}. "
        f"Parameters and optimizer: {gib(held)} ({told}){rest}.",
        f"would help: {'; '.join(text for text, helps in work.help.items() if helps)}.",
    ]


def _collectives(row: dict) -> str:
    found = row["collective_bytes_by_axes"]
    if found is None:
        return "?"
    return ", ".join(f"{kind} {size / 1e6:.3g} MB" for kind, size in found.items()) or "none"


def gib(size: int | None) -> str:
    """Bytes in GiB or MiB; "?" where they are not known."""
    if size is None:
        return "?"
    return f"{size / 2**30:.2f} GiB" if size >= 2**26 else f"{size / 2**20:.2f} MiB"


def number(value: float | None, unit: float) -> str:
    """A value in units, of three digits; "?" where it is not known."""
    return "?" if value is None else f"{value / unit:.3g}"
