"""Shards of candidates: which rows each has, and how drawn images become files.

They are encoded and written on threads while the next batch is drawn.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agfsync_jax.data import records
from agfsync_jax.data.images import encode_png

_THREADS = 8  # zlib runs outside the interpreter's lock
_MAX_WRITES = 2  # shards waiting to be written; then drawing waits, and memory stays bounded

Row = dict[str, Any]


class Shard(NamedTuple):
    """A file of candidates, and which they are: rows with prompt_id, candidate and seed."""

    path: Path
    rows: Sequence[Row]


def plan_shards(
    folder: Path,
    prompt_ids: Sequence[str],
    *,
    prompts_per_shard: int,
    num_candidates: int,
    seed_of: Callable[[str, int], int],
) -> list[Shard]:
    """All shards of a folder; the last one may have fewer prompts.

    A prompt's candidates follow each other; `seed_of(prompt id, candidate)` is what each is drawn
    from.
    """
    count = math.ceil(len(prompt_ids) / prompts_per_shard)
    return [
        Shard(
            folder / f"{records.shard_name(index, count)}.tfrecord",
            [
                {"prompt_id": prompt_id, "candidate": each, "seed": seed_of(prompt_id, each)}
                for prompt_id in prompt_ids[start : start + prompts_per_shard]
                for each in range(num_candidates)
            ],
        )
        for index, start in enumerate(range(0, len(prompt_ids), prompts_per_shard))
    ]


def largest_batch(shards: Sequence[Shard], num_processes: int) -> int:
    """How many images all processes together have to draw at once, at most: what a batch holds
    beyond that is padding. It is that of all shards, whatever is there already."""
    most = max(
        sum(len(shard.rows) for shard in shards[index::num_processes])
        for index in range(num_processes)
    )
    return most * num_processes


def draw_candidates(
    generator: Any,
    params: Any,
    shards: Sequence[Shard],
    undrawn: Collection[Path],
    prompts: Mapping[str, str],
    num_candidates: int,
) -> Iterator[int]:
    """Draws and writes the undrawn of this process's shards; the processes call it together.

    The batches are those in which all shards would be drawn, so that a shard is the same bytes
    whatever else is there already.

    Args:
        generator, params: see diffusion/generation.py.
        undrawn: the paths to write.
        prompts: prompt id -> text.
        num_candidates: rows a prompt.

    Yields, raises: see `write_candidates`.
    """
    rows = [row for shard in shards for row in shard.rows]
    texts = [prompts[row["prompt_id"]] for row in rows if row["candidate"] == 0]
    shape = len(texts), num_candidates
    seeds = np.array([row["seed"] for row in rows], np.uint32).reshape(shape)
    perturb = np.array([row["candidate"] > 0 for row in rows], bool).reshape(shape)
    wanted = np.array([shard.path in undrawn for shard in shards for _ in shard.rows], bool)
    batches = generator.stream(params, texts, seeds, perturb, wanted=wanted)
    yield from write_candidates(batches, [shard for shard in shards if shard.path in undrawn])


def write_candidates(
    batches: Iterable[tuple[Any, np.ndarray, np.ndarray]],
    shards: Sequence[Shard],
) -> Iterator[int]:
    """Writes each shard as soon as its last row is drawn.

    Args:
        batches: (which rows, latents [b, h, w, c] float16, images [b, H, W, 3] uint8) in order:
            all rows of all shards and no others; see diffusion/generation.py.

    Yields:
        The number of images of every batch.

    Raises:
        OSError: no space left; shards before are whole, later ones are absent.
    """
    rows = itertools.chain.from_iterable(shard.rows for shard in shards)
    waiting, drawn = deque(shards), []
    writes: deque[Future] = deque()
    records.example_class()
    with ThreadPoolExecutor(_THREADS) as encoders, ThreadPoolExecutor(1) as writer:
        for _, latents, images in batches:
            own = itertools.islice(rows, len(images))
            for row, latent, image in zip(own, latents, images, strict=True):
                drawn.append((row, latent, encoders.submit(encode_png, image)))
            while waiting and len(drawn) >= len(waiting[0].rows):
                shard = waiting.popleft()
                writes.append(writer.submit(_write, shard.path, drawn[: len(shard.rows)]))
                del drawn[: len(shard.rows)]
            while writes and (writes[0].done() or len(writes) > _MAX_WRITES):
                writes.popleft().result()
            yield len(images)
        for write in writes:
            write.result()


def _write(path: Path, drawn: Sequence[tuple[Row, np.ndarray, Future]]) -> None:
    rows = [row | {"latents": latent, "image": picture.result()} for row, latent, picture in drawn]
    records.write_shard(path, rows, records.CANDIDATE_FEATURES)
