"""A round's pairs beside the scores and answers that they come from, for a person to judge."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.reports import panels, tallies
from agfsync_jax.reports.rounds import (
    distinct,
    find_images,
    pair_columns,
    parsed,
    read_scored,
    scores_at,
)

_ANSWERS = "prompt_id candidate scorer index question element_type expected answer correct".split()


def read_gallery(folder: Path, count: int, seed: int) -> SimpleNamespace:
    """All that the gallery shows; a ranking counts as a pair of its best and its worst image.

    Of images, only those of the examples are read.

    Args:
        folder: of the round.
        count: examples of each sort.
        seed: of the random sample.

    Returns:
        counts, settings, scoring: what pair.json counts, its settings, and score.json.
        is_ranked, is_import: whether these are rankings, or what people prefer.
        pairs: prompts, chosen, rejected: int [m], the prompt by its number, the images by their
            candidate numbers; margin: float [m].
        prompts: int [n], the number of each scored candidate's prompt.
        columns: {name: float [n]}; chosen, rejected: the same of the pairs' sides, float [m].
        signs: {name: 1.0, or -1.0 where the weight says that lower is better}.
        answers: {scorer: {element_type: {"all" | "chosen" | "rejected": (right, answered)}}}.
        examples: {heading: examples}, each {"prompt", "margin", "sides"}, and a side, the
            preferred one first, {"candidate", "total", "scores", "answers", "png" or None}.

    Raises:
        FileNotFoundError: no pairs there.
    """
    found = pair_columns(folder / "pairs")
    scored, counts = read_scored(folder), parsed(folder / "pair.json")
    settings, _ = counts.pop("settings", {}), counts.pop("made_from", "")
    weights = settings.get("weights", {})
    names = panels.metric_names([scored.columns])
    names += [name for name in weights if name in scored.columns and name not in names]
    scored.columns = {name: scored.columns[name] for name in names}
    numbers = scored.numbers
    pairs = SimpleNamespace(
        prompts=np.array([numbers.setdefault(i, len(numbers)) for i in found["prompt_id"]]),
        chosen=np.asarray(found["chosen_candidate"]),
        rejected=np.asarray(found["rejected_candidate"]),
        margin=np.asarray(found["margin"], np.float64),
    )
    source = SimpleNamespace(
        counts=counts,
        settings=settings,
        scoring=parsed(folder / "score.json"),
        is_ranked="candidates" in found,
        is_import=bool(settings.get("path")),
        pairs=pairs,
        prompts=scored.prompts,
        columns=scored.columns,
        chosen=_of_side(scored, found["prompt_id"], pairs.chosen),
        rejected=_of_side(scored, found["prompt_id"], pairs.rejected),
        signs={name: -1.0 if weights.get(name, 1.0) < 0 else 1.0 for name in names},
    )
    picked = _pick(source, found["prompt_id"], count, seed)
    shown = {place for places in picked.values() for place in places}
    source.answers, asked = _read_answers(
        folder / "scores", scored, pairs, {found["prompt_id"][place] for place in shown}
    )
    examples = _examples(folder, found, scored, asked, shown)
    source.examples = {heading: [examples[i] for i in places] for heading, places in picked.items()}
    return source


def _of_side(scored: SimpleNamespace, prompt_ids: Sequence[str], candidates: np.ndarray) -> dict:
    """{name: scores [m]} of one image of each pair; NaN where there is none."""
    keys = zip(prompt_ids, candidates.tolist(), strict=True)
    rows = np.array([scored.rows.get(key, -1) for key in keys])
    return {name: np.where(rows < 0, np.nan, x[rows]) for name, x in scored.columns.items()}


def _pick(
    source: SimpleNamespace, prompt_ids: Sequence[str], count: int, seed: int
) -> dict[str, list[int]]:
    """{heading: places of pairs}: a prompt at most once a heading, equal ones in random order."""
    margin = np.abs(source.pairs.margin)  # negative where labels are shuffled
    order = np.random.default_rng(seed).permutation(len(margin))
    differences = [
        sign * (source.chosen[name] - source.rejected[name]) for name, sign in source.signs.items()
    ]
    spreads = [tallies.spread(source.prompts, x).within for x in source.columns.values()]
    conflict = tallies.disagreement(np.reshape(differences, (-1, len(margin))), spreads)

    def first(places) -> list[int]:
        return [place for _, place in distinct(((prompt_ids[i], int(i)) for i in places), count)]

    picked = {"A random sample": first(order)}
    if np.ptp(margin):
        ranked = order[np.argsort(-margin[order], kind="stable")]
        picked["The largest margins"] = first(ranked)
        picked["The smallest margins"] = first(ranked[::-1])
    ranked = order[np.argsort(-conflict[order], kind="stable")]
    picked["Where the scores disagree most"] = first(i for i in ranked if conflict[i] > 0)
    return picked


def _examples(
    folder: Path,
    found: dict[str, Sequence],
    scored: SimpleNamespace,
    answers: dict[tuple[str, int], list[dict]],
    places: Collection[int],
) -> dict[int, dict]:
    """Place of a pair -> what is shown of it."""

    def both(place: int, what: str) -> list:
        if f"{what}s" in found:  # of a ranking
            return np.asarray(found[f"{what}s"][place]).tolist()
        return [found[f"{side}_{what}"][place].item() for side in ("chosen", "rejected")]

    ids = {place: (found["pair_id"][place], found["prompt_id"][place]) for place in places}
    wanted = {
        (*ids[place], candidate) for place in places for candidate in both(place, "candidate")
    }
    images = find_images(folder, wanted, scored.shards)

    def side(pair_id: str, prompt_id: str, candidate: int, total: float) -> dict:
        row = scored.rows.get((prompt_id, candidate))
        return {
            "candidate": candidate,
            "total": total,
            "scores": {} if row is None else scores_at(scored, row),
            "answers": answers.get((prompt_id, candidate), []),
            "png": images.get((pair_id, candidate)),
        }

    return {
        place: {
            "prompt": found["prompt"][place],
            "margin": float(found["margin"][place]),
            "sides": [
                side(*ids[place], *each)
                for each in zip(both(place, "candidate"), both(place, "score"), strict=True)
            ],
        }
        for place in places
    }


def _read_answers(
    scores: Path, scored: SimpleNamespace, pairs: SimpleNamespace, wanted: Collection[str]
) -> tuple[dict, dict[tuple[str, int], list[dict]]]:
    """Counts right answers, and keeps the rows of the wanted prompts.

    Files are read one by one, column by column: there are millions of answers. An image counts as
    chosen, or as rejected, as often as it is in a pair.

    Returns:
        what `read_gallery` calls answers, and (prompt_id, candidate) -> rows in order.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = [scored.candidates, pairs.chosen, pairs.rejected]
    shape = len(scored.numbers), 1 + max(each.max(initial=-1) for each in numbers)
    times = {"all": np.ones(shape), "chosen": np.zeros(shape), "rejected": np.zeros(shape)}
    for side in ("chosen", "rejected"):
        np.add.at(times[side], (pairs.prompts, getattr(pairs, side)), 1)
    counted: dict = defaultdict(lambda: defaultdict(lambda: {side: np.zeros(2) for side in times}))
    rows = defaultdict(list)
    paths = [scores / f"answers-{name}.parquet" for name in sorted(set(scored.shards.values()))]
    for path in (path for path in paths if path.exists()):
        table = records.read_table(path, _ANSWERS)
        kept = table.filter(pc.is_in(table["prompt_id"], pa.array(wanted, pa.string())))
        for row in kept.to_pylist():
            rows[row["prompt_id"], row["candidate"]].append(row)
        table = table.filter(table["answer"].is_valid())
        prompts, prompt = _encoded(table["prompt_id"])
        kinds, kind = _encoded(table["element_type"])
        scorers, scorer = _encoded(table["scorer"])
        prompt = np.array([scored.numbers[each] for each in prompts], int)[prompt]
        candidate, right = table["candidate"].to_numpy(), table["correct"].to_numpy()
        for side, weights in times.items():
            group, weight = scorer * len(kinds) + kind, weights[prompt, candidate]
            size = len(scorers) * len(kinds)
            sums = [np.bincount(group, x, size) for x in (weight * right, weight)]
            for index, each in enumerate(zip(*sums, strict=True)):
                counted[scorers[index // len(kinds)]][kinds[index % len(kinds)]][side] += each
    for each in rows.values():
        each.sort(key=lambda row: (row["scorer"], row["index"]))
    return counted, rows


def _encoded(column) -> tuple[list, np.ndarray]:
    """The distinct values of an Arrow column, and which of them each row has."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
