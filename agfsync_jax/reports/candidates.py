"""A round's pairs beside the scores and answers that they come from, for a person to judge."""

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.columns import KEYS, Column, without_parts
from agfsync_jax.data.pairs import read_features, read_pairs
from agfsync_jax.reports import tallies
from agfsync_jax.reports.formats import describe
from agfsync_jax.reports.pictures import distinct, find_images
from agfsync_jax.reports.rounds import label_of
from agfsync_jax.utils.files import read_json, to_path

_ANSWERS = "prompt_id candidate scorer index question element_type expected answer correct".split()


@dataclasses.dataclass
class Gallery:
    """All that the gallery shows; a ranking counts as a pair of its best and its worst image."""

    label: str  # of its round
    counts: dict[str, Any]  # of pair.json
    settings: dict[str, Any]  # of pair.json
    scoring: dict[str, Any]  # score.json
    is_ranked: bool
    is_import: bool  # what people prefer
    # prompts, chosen, rejected: int [m], the prompt by its number, the images by their candidate
    # numbers; margin: float [m]
    pairs: SimpleNamespace
    prompts: np.ndarray  # int [n], the number of each scored candidate's prompt
    columns: dict[str, Column]  # of the scores
    scores: dict[str, np.ndarray]  # float [n] a column
    chosen: dict[str, np.ndarray]  # float [m] a column
    rejected: dict[str, np.ndarray]
    # scorer -> element type -> "all", "chosen", "rejected" -> (right, answered)
    answers: dict[str, dict] = dataclasses.field(default_factory=dict)
    # heading -> {"prompt", "margin", "sides"} each, and a side, the preferred one first,
    # {"candidate", "total", "scores", "answers", "png" or None}
    examples: dict[str, list[dict]] = dataclasses.field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, str]:
        """What the two sides of a pair are called."""
        return ("best", "worst") if self.is_ranked else ("chosen", "rejected")

    @property
    def num_pairs(self) -> int:
        return len(self.pairs.margin)

    @property
    def num_prompts(self) -> int:
        """Prompts with a pair."""
        return len(np.unique(self.pairs.prompts))

    @property
    def num_all_prompts(self) -> int:
        """Prompts that there were; 0: not known."""
        return self.counts.get("prompts", 0)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each column that has a say in the total."""
        weights = self.settings.get("weights", {})
        return {name: weights[name] for name in describe(weights, self.columns) if weights[name]}

    @property
    def signs(self) -> dict[str, float]:
        """-1.0 where lower is better, as the sign of its weight says, or the column itself; 1.0."""
        weights = self.weights
        return {
            name: 1.0 if (weights[name] > 0 if name in weights else c.higher_is_better) else -1.0
            for name, c in self.columns.items()
        }

    @property
    def spreads(self) -> dict[str, tallies.Spread]:
        """How far each score tells candidates apart."""
        return {name: tallies.spread(self.prompts, self.scores[name]) for name in self.columns}

    @property
    def agreement(self) -> dict[str, tuple[float, float, float]]:
        """Shares of pairs whose chosen image is better, equal, worse by each score."""
        return {
            name: tallies.agreement(sign * self.chosen[name], sign * self.rejected[name])
            for name, sign in self.signs.items()
        }

    @property
    def wins(self) -> dict[int, tallies.Wins]:
        """How the candidate of each number does."""
        return tallies.wins(self.pairs.prompts, self.pairs.chosen, self.pairs.rejected)


def read_gallery(folder: Path, columns: Mapping[str, Column], count: int, seed: int) -> Gallery:
    """Reads a round; of images, only those of the examples.

    Args:
        folder: of the round.
        columns: what is known of columns, in the order to show.
        count: examples of each sort.
        seed: of the random sample.

    Raises:
        FileNotFoundError: no pairs there.
    """
    features, counts = read_features(folder / "pairs"), read_json(folder / "pair.json")
    settings, _ = counts.pop("settings", {}), counts.pop("made_from", "")
    is_ranked, path = "candidates" in features, settings.get("path")
    # Pairs of another workdir's candidates have scores, and those of people none.
    is_import = bool(path) and not any("scores/" in n or n.startswith("columns/") for n in features)
    source = to_path(path).expanduser() if path and not is_import else folder
    found = _read_pairs(folder / "pairs", is_ranked)
    scored = _read_scored(source, columns)
    names = without_parts(scored.scores)
    names += [n for n in settings.get("weights", {}) if n in scored.scores and n not in names]
    scored.scores = {name: scored.scores[name] for name in names}
    numbers = scored.numbers
    pairs = SimpleNamespace(
        prompts=np.array([numbers.setdefault(i, len(numbers)) for i in found["prompt_id"]]),
        chosen=np.array([each[0] for each in found["candidates"]], int),
        rejected=np.array([each[-1] for each in found["candidates"]], int),
        margin=np.asarray(found["margin"], np.float64),
    )
    gallery = Gallery(
        label=label_of(folder),
        counts=counts,
        settings=settings,
        scoring=read_json(source / "score.json"),
        is_ranked=is_ranked,
        is_import=is_import,
        pairs=pairs,
        prompts=scored.prompts,
        columns=describe(names, columns),
        scores=scored.scores,
        chosen=_of_side(scored, found["prompt_id"], pairs.chosen),
        rejected=_of_side(scored, found["prompt_id"], pairs.rejected),
    )
    picked = _pick(gallery, found["prompt_id"], count, seed)
    shown = {place for places in picked.values() for place in places}
    gallery.answers, asked = _read_answers(
        source / "scores", scored, pairs, {found["prompt_id"][place] for place in shown}
    )
    examples = _examples(folder, source, found, scored, asked, shown)
    gallery.examples = {name: [examples[i] for i in places] for name, places in picked.items()}
    return gallery


def _read_pairs(pairs: Path, is_ranked: bool) -> dict[str, Sequence]:
    """What tells of pairs, one entry a pair each; its candidates and their scores, best first."""
    always = ("pair_id", "prompt_id", "prompt", "margin")
    if is_ranked:
        return read_pairs(pairs, (*always, "candidates", "scores"))
    sides = {
        f"{what}s": [f"{side}_{what}" for side in ("chosen", "rejected")]
        for what in ("candidate", "score")
    }
    found = read_pairs(pairs, (*always, *sides["candidates"], *sides["scores"]))
    return found | {
        name: np.stack([found.pop(column) for column in columns], 1)
        for name, columns in sides.items()
    }


def _read_scored(folder: Path, columns: Mapping[str, Column]) -> SimpleNamespace:
    """The scores of a round, one entry a candidate; nothing where there are none.

    Returns:
        numbers: prompt_id -> 0, 1, 2, ...
        shards: prompt_id -> name of its shard.
        rows: (prompt_id, candidate) -> its place in what follows.
        prompts, candidates: int [n], the prompt by its number.
        scores: {name: float64 [n]}, NaN where there is no score.

    Raises:
        ValueError: shards with different columns.
    """
    shards, rows, scores = {}, {}, {}
    for path in sorted((folder / "scores").glob("[0-9]*.parquet")):
        table = records.read_table(path)
        for key in zip(*(table[name].to_pylist() for name in KEYS), strict=True):
            rows[key] = len(rows)
            shards[key[0]] = path.stem
        names = set(table.column_names) - set(KEYS)
        if scores and names != set(scores):
            raise ValueError(
                f"{path} has the columns {', '.join(sorted(names))}, the shards before it have"
                f" {', '.join(sorted(scores))}: remove the stale ones and run `agfsync score`."
            )
        for name in names:
            scores.setdefault(name, []).append(np.asarray(table[name].to_numpy(), np.float64))
    numbers = {prompt: number for number, prompt in enumerate(shards)}
    return SimpleNamespace(
        numbers=numbers,
        shards=shards,
        rows=rows,
        prompts=np.array([numbers[prompt] for prompt, _ in rows], int),
        candidates=np.array([candidate for _, candidate in rows], int),
        scores={name: np.concatenate(scores[name]) for name in describe(scores, columns)},
    )


def _of_side(scored: SimpleNamespace, prompt_ids: Sequence[str], candidates: np.ndarray) -> dict:
    """{name: scores [m]} of one image of each pair; NaN where there is none."""
    keys = zip(prompt_ids, candidates.tolist(), strict=True)
    rows = np.array([scored.rows.get(key, -1) for key in keys])
    return {name: np.where(rows < 0, np.nan, x[rows]) for name, x in scored.scores.items()}


def _pick(
    gallery: Gallery, prompt_ids: Sequence[str], count: int, seed: int
) -> dict[str, list[int]]:
    """{heading: places of pairs}: a prompt at most once a heading, equal ones in random order."""
    margin = np.abs(gallery.pairs.margin)  # negative where labels are shuffled
    order = np.random.default_rng(seed).permutation(len(margin))
    chosen, rejected, signs = gallery.chosen, gallery.rejected, gallery.signs
    differences = [sign * (chosen[name] - rejected[name]) for name, sign in signs.items()]
    spreads = [spread.within for spread in gallery.spreads.values()]
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
    source: Path,
    found: dict[str, Sequence],
    scored: SimpleNamespace,
    answers: dict[tuple[str, int], list[dict]],
    places: Collection[int],
) -> dict[int, dict]:
    """Place of a pair -> what is shown of it."""
    pairs = {place: {name: column[place] for name, column in found.items()} for place in places}
    wanted = {
        (pair["pair_id"], pair["prompt_id"], candidate)
        for pair in pairs.values()
        for candidate in pair["candidates"].tolist()
    }
    images = find_images(folder / "pairs", source / "candidates", wanted, scored.shards)

    def side(pair: dict, candidate: int, total: float) -> dict:
        key = pair["prompt_id"], candidate
        row = scored.rows.get(key)
        scores = {} if row is None else scored.scores
        return {
            "candidate": candidate,
            "total": total,
            "scores": {name: float(column[row]) for name, column in scores.items()},
            "answers": answers.get(key, []),
            "png": images.get((pair["pair_id"], candidate)),
        }

    return {
        place: {
            "prompt": pair["prompt"],
            "margin": float(pair["margin"]),
            "sides": [
                side(pair, *each)
                for each in zip(pair["candidates"].tolist(), pair["scores"].tolist(), strict=True)
            ],
        }
        for place, pair in pairs.items()
    }


def _read_answers(
    scores: Path, scored: SimpleNamespace, pairs: SimpleNamespace, wanted: Collection[str]
) -> tuple[dict, dict[tuple[str, int], list[dict]]]:
    """Counts right answers, and keeps the rows of the wanted prompts.

    Files are read one by one, column by column: there are millions of answers. An image counts as
    chosen, or as rejected, as often as it is in a pair. Rows are by (prompt_id, candidate).
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
    prompts = pa.array(list(scored.numbers), pa.string())
    paths = [scores / f"answers-{name}.parquet" for name in sorted(set(scored.shards.values()))]
    for path in (path for path in paths if path.exists()):
        table = records.read_table(path, _ANSWERS)
        kept = table.filter(pc.is_in(table["prompt_id"], pa.array(wanted, pa.string())))
        for row in kept.to_pylist():
            rows[row["prompt_id"], row["candidate"]].append(row)
        table = table.filter(table["answer"].is_valid())
        prompt = pc.index_in(table["prompt_id"], prompts).to_numpy()
        candidate, right = table["candidate"].to_numpy(), table["correct"].to_numpy()
        groups = table["scorer"], table["element_type"]
        for side, weights in times.items():
            weight = weights[prompt, candidate]
            names = ["scorer", "kind", "right", "answered"]
            columns = pa.table([*groups, weight * right, weight], names)
            sums = columns.group_by(names[:2], use_threads=False).aggregate(
                [(name, "sum") for name in names[2:]]
            )
            for row in sums.to_pylist():
                counted[row["scorer"]][row["kind"]][side] += row["right_sum"], row["answered_sum"]
    for each in rows.values():
        each.sort(key=lambda row: (row["scorer"], row["index"]))
    return counted, rows
