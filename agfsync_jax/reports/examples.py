"""Which pictures of base and tuned model a report shows."""

import math
from collections import defaultdict

import numpy as np

from agfsync_jax.reports.pictures import distinct, read_images
from agfsync_jax.reports.rounds import Report


def pick_examples(report: Report, count: int, seed: int) -> dict[str, list[dict]]:
    """{heading: examples}: a fixed random sample, the most improved and the most worsened.

    The independent judge says what is improved, then the scorers, each where those before it see
    no change.

    Returns:
        of each example "prompt", "base" and "tuned", which are {"png", "scores": the score row,
        "answers": rows}.
    """
    last = report.last
    if not last.delta:
        return {}
    rows = last.images()
    keys = list(rows)
    judges = {n: c for n, c in report.columns.items() if n not in report.judges[1:]}

    def change(key) -> tuple:
        base, tuned = rows[key]
        return tuple(
            (tuned[name] - base[name]) * (1 if column.higher_is_better else -1)
            for name, column in judges.items()
        )

    order = np.random.default_rng(seed).permutation(len(keys))
    ranked = sorted((keys[i] for i in order), key=change)  # equal changes stay in random order
    half = math.ceil(count / 2)
    chosen = {
        "A random sample": distinct((keys[i] for i in order), count),
        "Most improved": distinct((k for k in reversed(ranked) if change(k)[0] > 0), half),
        "Most worsened": distinct((k for k in ranked if change(k)[0] < 0), half),
    }
    wanted = {key for picked in chosen.values() for key in picked}
    folders = {"base": last.base_evals / "base", "tuned": last.folder / "evals" / "tuned"}
    images = {}
    for name, folder in folders.items():
        paths = sorted(folder.glob("*.tfrecord"))
        judged = [path.with_suffix(".parquet") for path in paths]
        images[name] = read_images(paths, judged, wanted)
    answers = defaultdict(list)
    for name, table in last.answers.items():
        for row in table:
            answers[name, row["prompt_id"], row["candidate"]].append(row)

    def example(key) -> dict:
        sides = {
            name: {"png": images[name][key], "scores": scores, "answers": answers[name, *key]}
            for name, scores in zip(images, rows[key], strict=True)
        }
        return {"prompt": last.prompts[key[0]]["prompt"], **sides}

    whole = images["base"].keys() & images["tuned"].keys()
    return {
        heading: [example(key) for key in picked if key in whole]
        for heading, picked in chosen.items()
    }
