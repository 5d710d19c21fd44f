"""PNGs of a workdir: those drawn in a round, and those that lie with its pairs."""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.pairs import read_features, stream_pairs
from agfsync_jax.data.scores import num_images, scores_path


def distinct(keys: Iterable[tuple[str, Hashable]], count: int) -> list[tuple[str, Hashable]]:
    """The first `count` keys with different prompts, which come first in them."""
    first = {}
    for key in keys:
        first.setdefault(key[0], key)
        if len(first) == count:
            break
    return list(first.values())


def read_images(
    paths: Sequence[Path], scores: Sequence[Path], wanted: Collection
) -> dict[tuple[str, int], bytes]:
    """PNG bytes of the wanted (prompt_id, candidate) in shards of candidates, which have scores."""
    images, fields = {}, ["prompt_id", "candidate", "image"]
    for path, table in zip(paths, scores, strict=True):
        size = num_images(table) if table.exists() else None
        for row in records.read_shard(path, records.CANDIDATE_FEATURES, fields, num_rows=size):
            if (row["prompt_id"], row["candidate"]) in wanted:
                images[row["prompt_id"], row["candidate"]] = row["image"]
    return images


def _read_stored(pairs: Path, wanted: Collection) -> dict[tuple[str, int], bytes]:
    """The PNGs of the wanted (pair_id, candidate) that lie with the pairs themselves."""
    features, images = read_features(pairs), {}
    for name, candidate in (
        ("chosen_image", "chosen_candidate"),
        ("rejected_image", "rejected_candidate"),
        ("images", "candidates"),
    ):
        if name not in features:
            continue
        for row in stream_pairs(pairs, features, ["pair_id", candidate, name]):
            pngs = row[name] if name == "images" else [row[name]]
            numbers = np.atleast_1d(row[candidate]).tolist()
            for number, png in zip(numbers, pngs, strict=True):
                if (row["pair_id"], number) in wanted:
                    images[row["pair_id"], number] = png
    return images


def find_images(
    pairs: Path,
    candidates: Path,
    wanted: Collection[tuple[str, str, int]],
    shards: Mapping[str, str],
) -> dict[tuple[str, int], bytes]:
    """PNGs of (pair_id, prompt_id, candidate): of the candidates, else stored with the pairs.

    Args:
        shards: prompt_id -> the name of the shard that holds its candidates.

    Returns:
        (pair_id, candidate) -> PNG, of those that are there.
    """
    names = sorted({shards[prompt] for _, prompt, _ in wanted if prompt in shards})
    paths = [candidates / f"{name}.tfrecord" for name in names]
    keys = {(prompt, candidate) for _, prompt, candidate in wanted}
    paths = [path for path in paths if path.exists()]
    drawn = read_images(paths, [scores_path(path) for path in paths], keys)
    images = {(pair, c): drawn[prompt, c] for pair, prompt, c in wanted if (prompt, c) in drawn}
    left = {(pair, c) for pair, _, c in wanted} - images.keys()
    return images | (_read_stored(pairs, left) if left else {})
