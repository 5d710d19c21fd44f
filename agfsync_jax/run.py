"""The closed loop: every verb in order, for `config.rounds` rounds, then the report.

Each round writes prompts and questions, draws candidates, scores and pairs them, trains on the
pairs and evaluates; the next round draws from the model that the last one trained. With
`config.pair.path` the pairs are made of another workdir's candidates, or are people's, and a round
begins with them. What lies in the workdir is not done again: the same command continues a run that
was stopped.

    agfsync run --config=configs/micro.py --workdir=runs/micro
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from agfsync_jax import evaluate, pair, prompts, questions, sample, score, train
from agfsync_jax.utils.files import read_json, to_path
from agfsync_jax.utils.statistics import aligned, digits, format_interval

SCORED = (prompts, questions, sample, score)  # what pairs of people's choices need not
ROUND = (*SCORED, pair, train, evaluate)


def verbs(config: ConfigDict) -> tuple[Any, ...]:
    """Those of a round, in order."""
    return ROUND[len(SCORED) :] if config.pair.path else ROUND


def main(
    config: ConfigDict,
    workdir: Path,
    *,
    round_index: int = 0,
    repair: bool = False,
    rehearse: bool = False,
    random_weights: bool = False,
    step: str = "last",
) -> None:
    """Runs rounds `round_index` to `config.rounds` - 1 and prints what came out.

    Args:
        rehearse: measure a round with the least work instead; see rehearsal.py.
        random_weights: of a rehearsal.
        step: of a training, that evaluations and later rounds take: last, best or a number.
    """
    if rehearse:
        from agfsync_jax import rehearsal

        rehearsal.main(config, workdir, random_weights=random_weights)
        return
    for index in range(round_index, config.rounds):
        go_through(verbs(config), config, workdir, round_index=index, repair=repair, step=step)
    if jax.process_index() == 0:
        from agfsync_jax import report  # and with it what draws charts, which no round needs

        report.main(config, workdir)  # prints where it is
        print(table(read_json(to_path(workdir) / "summary.json")))


def go_through(verbs: Sequence[Any], config: ConfigDict, workdir: Path, **flags: Any) -> None:
    """Verbs of the loop, one after another."""
    for verb in verbs:
        verb.main(config, workdir, **flags)
        jax.clear_caches()  # the programs of one verb are of no use to the next
        gc.collect()


def table(summary: dict[str, Any]) -> str:
    """Base against tuned, last round of a summary.json, with 95% intervals."""
    last = summary["rounds"][-1]
    rows = [("", "base", "tuned", "tuned - base", "win rate")]
    for metric, base in last["base"].items():
        win, shown = last["win_rate"].get(metric), digits(last["delta"][metric])
        rows.append(
            (
                metric,
                format_interval(base, shown),
                format_interval(last["tuned"][metric], shown),
                format_interval(last["delta"][metric], shown, signed=True),
                format_interval(win) if win else "",
            )
        )
    lines = aligned(rows)
    seconds = sum(
        stage["seconds"] for entry in summary["rounds"] for stage in entry["stages"].values()
    )
    pairs = sum(entry["pairs"] or 0 for entry in summary["rounds"])
    rounds = len(summary["rounds"])
    lines.append(f"{rounds} round{'s' * (rounds > 1)}, {pairs} pairs, {seconds / 60:.1f} min")
    return "\n".join(lines)
