"""The rows of a pairs dataset, put together one by one: from candidates, and from people's choices.

What they hold is the table of `pairs.pair_features`.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from agfsync_jax.data import records
from agfsync_jax.data.embeddings import BatchEncoder, to_half
from agfsync_jax.data.images import decode_pngs, encode_pngs
from agfsync_jax.data.imports import Preference
from agfsync_jax.data.preferences import Choice, Scored

Row = dict[str, Any]
# What a ranking has for each candidate, and what each side of a pair calls it.
_OF_A_SIDE = {"candidates": "candidate", "scores": "score", "images": "image", "columns": "scores"}


def text_fields(
    texts: Sequence[str],
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "b n"]],
    encode: BatchEncoder | None,
) -> list[Row]:
    """The fields that belong to a prompt: token_ids, and embeddings/* where there is an encoder.

    Raises:
        ValueError: embeddings that do not fit float16.
    """
    tokens = tokenize(texts)
    rows = [{"token_ids": each} for each in tokens]
    for name, leaf in (encode(tokens) if encode else {}).items():
        half = to_half(leaf, "text embeddings", "set config.pair.embeddings=False")
        for row, value in zip(rows, half, strict=True):
            row[f"embeddings/{name}"] = value
    return rows


def pair_rows(
    folder: Path,
    choices: Sequence[Choice],
    prompts: Mapping[str, str],
    scores: Mapping[str, Scored],
    texts: Callable[[Sequence[str]], list[Row]],
    *,
    ranked: bool,
    with_images: bool,
    flip: BatchEncoder | None = None,
) -> Iterator[Row]:
    """Rows of what the scores prefer; one shard of candidates is in memory at a time.

    Args:
        folder: of the candidates.
        choices: those of a shard follow each other.
        prompts: prompt id -> text.
        scores: shard -> what the choices were made from.
        texts: `text_fields` of texts alone.
        ranked: rankings instead of pairs.
        with_images: whether PNGs are stored.
        flip: images uint8 [n, h, w, 3] -> latents, where those of mirrored images are stored too.

    Raises:
        RecordError: a damaged shard of candidates.
        ValueError: a shard of candidates lacks an image that has a score; latents that do not fit
            float16.
    """
    stored = {"latents": "latents"} | ({"images": "image"} if with_images else {})
    fields = {"prompt_id", "candidate", *stored.values()} | ({"image"} if flip else set())
    for shard, group in itertools.groupby(choices, key=lambda choice: choice.shard):
        group = list(group)
        wanted = {(choice.prompt_id, each) for choice in group for each in choice.candidates}
        path = folder / f"{shard}.tfrecord"
        scored = scores[shard]
        rows = records.read_shard(
            path, records.CANDIDATE_FEATURES, fields, num_rows=scored.num_images
        )
        drawn = {
            key: row for row in rows if (key := (row["prompt_id"], row["candidate"])) in wanted
        }
        if missing := wanted - set(drawn):
            raise ValueError(
                f"{path} lacks {len(missing)} images that have scores, such as {min(missing)}:"
                " remove its scores and run `agfsync score` again."
            )
        if flip:
            for row, latents in zip(drawn.values(), _flipped(drawn.values(), flip), strict=True):
                row["latents_flipped"] = latents
            stored["latents_flipped"] = "latents_flipped"
        keys = zip(scored.prompt_ids, scored.candidates, strict=True)
        place = {key: row for row, key in enumerate(keys)}
        ids = list(dict.fromkeys(choice.prompt_id for choice in group))
        by_prompt = dict(zip(ids, texts([prompts[each] for each in ids]), strict=True))
        for choice in group:
            at = [(choice.prompt_id, each) for each in choice.candidates]
            values = {"candidates": choice.candidates, "scores": choice.scores}
            values |= {name: [drawn[key][field] for key in at] for name, field in stored.items()}
            for name, column in scored.columns.items():
                values[f"columns/{name}"] = [float(column[place[key]]) for key in at]
            yield {
                "pair_id": choice.pair_id,
                "prompt_id": choice.prompt_id,
                "prompt": prompts[choice.prompt_id],
                "margin": choice.margin,
                **by_prompt[choice.prompt_id],
                **(values if ranked else _sides(values)),
            }


def _flipped(rows: Collection[Row], encode: BatchEncoder) -> Iterator[np.ndarray]:
    """The latents of the mirrored images of rows, one by one."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, encode.batch_size)):
        pictures = decode_pngs([row["image"] for row in chunk])
        yield from _half_latents(encode(pictures[:, :, ::-1]))


def _half_latents(latents: Any) -> np.ndarray:
    return to_half(latents, "latents of images", "set config.backbone.dtype=float32")


def imported_rows(
    preferences: Iterable[Preference],
    encode: BatchEncoder,
    texts: Callable[[Sequence[str]], list[Row]],
    *,
    with_images: bool,
    is_swapped: Callable[[str], bool],
    with_flips: bool = False,
) -> Iterator[Row]:
    """Rows of what people prefer; the next images are prepared while the device encodes some.

    Candidate 0 is a row's first image and 1 its second. The chosen one's score is 1, the other's 0.

    Args:
        encode: images uint8 [n, h, w, 3] -> latents.
        texts, with_images: see `pair_rows`.
        is_swapped: pair_id -> whether chosen and rejected change places (a control).
        with_flips: whether latents of the mirrored images are stored too.

    Raises:
        ValueError: latents that do not fit float16.
    """

    def started():
        for chunk in _of_one_size(preferences, encode.batch_size // 2):
            pictures = np.stack([image for each in chunk for image in each.images])
            latents = [encode.start(pictures)]
            if with_flips:
                latents.append(encode.start(pictures[:, :, ::-1]))
            yield chunk, latents, encode_pngs(pictures) if with_images else None

    # A chunk is waited for when the next one is on its way.
    for (chunk, latents, pngs), _ in itertools.pairwise(itertools.chain(started(), [None])):
        made = dict(zip(("latents", "latents_flipped"), jax.device_get(latents), strict=False))
        made = {name: _half_latents(each[: 2 * len(chunk)]) for name, each in made.items()}
        made |= {"images": pngs} if with_images else {}
        fields = texts([each.caption for each in chunk])
        for index, (each, row) in enumerate(zip(chunk, fields, strict=True)):
            prompt_id = hashlib.sha256(each.caption.encode()).hexdigest()[:16]
            pair_id = f"{prompt_id}-{each.row}"  # a caption may have many rows
            order, scores = (each.chosen, 1 - each.chosen), (1.0, 0.0)
            if is_swapped(pair_id):
                order, scores = order[::-1], scores[::-1]
            values = {"candidates": order, "scores": scores}
            values |= {name: [each[2 * index + i] for i in order] for name, each in made.items()}
            yield {
                "pair_id": pair_id,
                "prompt_id": prompt_id,
                "prompt": each.caption,
                "margin": scores[0] - scores[1],
                **row,
                **_sides(values),
            }


def _of_one_size(preferences: Iterable[Preference], count: int) -> Iterator[list[Preference]]:
    """So many at a time, whose images have one size; fewer of each size at the end."""
    waiting: dict[tuple[int, ...], list[Preference]] = {}
    for each in preferences:
        chunk = waiting.setdefault(each.images[0].shape, [])
        chunk.append(each)
        if len(chunk) == count:
            yield waiting.pop(each.images[0].shape)
    yield from waiting.values()


def _sides(values: Mapping[str, Sequence]) -> Row:
    """What a ranking of two candidates has for each, as a pair has it of chosen and rejected."""
    row = {}
    for name, (chosen, rejected) in values.items():
        kind, slash, rest = name.partition("/")
        name = _OF_A_SIDE.get(kind, kind) + slash + rest
        row |= {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
    return row
