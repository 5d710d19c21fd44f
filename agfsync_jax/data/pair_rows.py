"""The rows of a pairs dataset, put together one by one: from candidates, and from people's choices.

What they hold is the table of `pairs.pair_features`.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from agfsync_jax.data import records
from agfsync_jax.data.embeddings import BatchEncoder, to_half
from agfsync_jax.data.images import encode_pngs
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

    Raises:
        RecordError: a damaged shard of candidates.
        ValueError: a shard of candidates lacks an image that has a score.
    """
    stored = {"latents": "latents"} | ({"images": "image"} if with_images else {})
    fields = ["prompt_id", "candidate", *stored.values()]
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


def imported_rows(
    preferences: Iterable[Preference],
    encode: BatchEncoder,
    texts: Callable[[Sequence[str]], list[Row]],
    *,
    with_images: bool,
    is_swapped: Callable[[str], bool],
) -> Iterator[Row]:
    """Rows of what people prefer; the next images are prepared while the device encodes some.

    Candidate 0 is a row's first image and 1 its second. The chosen one's score is 1, the other's 0.

    Args:
        encode: images uint8 [n, h, w, 3] -> latents.
        texts, with_images: see `pair_rows`.
        is_swapped: pair_id -> whether chosen and rejected change places (a control).

    Raises:
        ValueError: latents that do not fit float16.
    """
    preferences = iter(preferences)

    def started():
        while chunk := list(itertools.islice(preferences, encode.batch_size // 2)):
            pictures = np.stack([image for each in chunk for image in each.images])
            yield chunk, encode.start(pictures), encode_pngs(pictures) if with_images else None

    # A chunk is waited for when the next one is on its way.
    for (chunk, latents, pngs), _ in itertools.pairwise(itertools.chain(started(), [None])):
        latents = np.asarray(jax.device_get(latents))[: 2 * len(chunk)]
        latents = to_half(latents, "latents of images", "set config.backbone.dtype=float32")
        fields = texts([each.caption for each in chunk])
        for index, (each, row) in enumerate(zip(chunk, fields, strict=True)):
            prompt_id = hashlib.sha256(each.caption.encode()).hexdigest()[:16]
            pair_id = f"{prompt_id}-{each.row}"  # a caption may have many rows
            order, scores = (each.chosen, 1 - each.chosen), (1.0, 0.0)
            if is_swapped(pair_id):
                order, scores = order[::-1], scores[::-1]
            values = {"candidates": order, "scores": scores}
            for name, made in (("latents", latents), ("images", pngs)):
                if made is not None:
                    values[name] = [made[2 * index + i] for i in order]
            yield {
                "pair_id": pair_id,
                "prompt_id": prompt_id,
                "prompt": each.caption,
                "margin": scores[0] - scores[1],
                **row,
                **_sides(values),
            }


def _sides(values: Mapping[str, Sequence]) -> Row:
    """What a ranking of two candidates has for each, as a pair has it of chosen and rejected."""
    row = {}
    for name, (chosen, rejected) in values.items():
        kind, slash, rest = name.partition("/")
        name = _OF_A_SIDE.get(kind, kind) + slash + rest
        row |= {f"chosen_{name}": chosen, f"rejected_{name}": rejected}
    return row
