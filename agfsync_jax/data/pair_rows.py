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
from agfsync_jax.data.embeddings import to_half
from agfsync_jax.data.images import encode_pngs
from agfsync_jax.data.imports import Preference
from agfsync_jax.data.preferences import Choice, Scored

Row = dict[str, Any]
Run = Callable[[np.ndarray], Any]  # see embeddings.in_batches


def text_fields(
    texts: Sequence[str],
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "b n"]],
    encode: Run | None,
    batch_size: int,
) -> list[Row]:
    """The fields that belong to a prompt: token_ids, and embeddings/* where there is an encoder.

    Args:
        encode: token ids -> the pytree of what a denoiser is conditioned on; no more than
            `batch_size` rows at a time.

    Raises:
        ValueError: embeddings that do not fit float16.
    """
    tokens = tokenize(texts)
    rows = [{"token_ids": each} for each in tokens]
    if encode is None:
        return rows
    for start in range(0, len(tokens), batch_size):
        for name, leaf in jax.device_get(encode(tokens[start : start + batch_size])).items():
            half = to_half(leaf, "text embeddings", "set config.pair.embeddings=False")
            for row, value in zip(rows[start : start + batch_size], half, strict=False):
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
        texts: see `text_fields`.
        ranked: rankings instead of pairs.
        with_images: whether PNGs are stored.

    Raises:
        ValueError: a shard of candidates lacks an image that has a score.
    """
    fields = ["prompt_id", "candidate", "latents", *(["image"] if with_images else [])]
    for shard, group in itertools.groupby(choices, key=lambda choice: choice.shard):
        group = list(group)
        wanted = {(choice.prompt_id, each) for choice in group for each in choice.candidates}
        path = folder / f"{shard}.tfrecord"
        drawn = {
            key: row
            for row in records.read_shard(path, records.CANDIDATE_FEATURES, fields)
            if (key := (row["prompt_id"], row["candidate"])) in wanted
        }
        if missing := wanted - set(drawn):
            raise ValueError(
                f"{path} lacks {len(missing)} images that have scores, such as {min(missing)}:"
                " remove its scores and run `agfsync score` again."
            )
        scored = scores[shard]
        keys = zip(scored.prompt_ids, scored.candidates, strict=True)
        place = {key: row for row, key in enumerate(keys)}
        ids = list(dict.fromkeys(choice.prompt_id for choice in group))
        by_prompt = dict(zip(ids, texts([prompts[each] for each in ids]), strict=True))
        for choice in group:
            at = [(choice.prompt_id, each) for each in choice.candidates]
            columns = {
                name: [float(column[place[key]]) for key in at]
                for name, column in scored.columns.items()
            }
            row = {
                "pair_id": choice.pair_id,
                "prompt_id": choice.prompt_id,
                "prompt": prompts[choice.prompt_id],
                "margin": choice.margin,
            }
            row |= by_prompt[choice.prompt_id]
            latents = [drawn[key]["latents"] for key in at]
            pngs = [drawn[key]["image"] for key in at] if with_images else []
            if ranked:
                row |= _ranking(choice.candidates, choice.scores, latents, pngs, columns)
            else:
                row |= _sides(choice.candidates, choice.scores, latents, pngs, columns)
            yield row


def imported_rows(
    preferences: Iterable[Preference],
    encode: Run,
    num_pairs: int,
    texts: Callable[[Sequence[str]], list[Row]],
    *,
    with_images: bool,
    is_swapped: Callable[[str], bool] = lambda pair_id: False,
) -> Iterator[Row]:
    """Rows of what people prefer; the next images are prepared while the device encodes some.

    Candidate 0 is a row's first image and 1 its second. The chosen one's score is 1, the other's 0.

    Args:
        encode: images uint8 [2 * num_pairs, h, w, 3] -> latents; fewer images are filled up.
        num_pairs: encoded at a time.
        texts: see `text_fields`.
        with_images: whether PNGs are stored.
        is_swapped: pair_id -> whether chosen and rejected change places (a control).

    Raises:
        ValueError: latents that do not fit float16.
    """
    preferences, waiting = iter(preferences), None
    while chunk := list(itertools.islice(preferences, num_pairs)):
        pictures = np.stack([image for each in chunk for image in each.images])
        running = chunk, encode(pictures)
        pngs = encode_pngs(pictures) if with_images else []
        if waiting:
            yield from _imported(*waiting, texts, is_swapped)
        waiting = *running, pngs
    if waiting:
        yield from _imported(*waiting, texts, is_swapped)


def _imported(chunk, latents, pngs, texts, is_swapped) -> Iterator[Row]:
    latents = np.asarray(jax.device_get(latents))[: 2 * len(chunk)]
    latents = to_half(latents, "latents of images", "set config.backbone.dtype=float32")
    fields = texts([each.caption for each in chunk])
    for index, (each, row) in enumerate(zip(chunk, fields, strict=True)):
        prompt_id = hashlib.sha256(each.caption.encode()).hexdigest()[:16]
        pair_id = f"{prompt_id}-{each.row}"  # a caption may have many rows
        order = each.chosen, 1 - each.chosen
        scores = 1.0, 0.0
        if is_swapped(pair_id):
            order, scores = order[::-1], scores[::-1]
        yield {
            "pair_id": pair_id,
            "prompt_id": prompt_id,
            "prompt": each.caption,
            "margin": scores[0] - scores[1],
            **row,
            **_sides(
                order,
                scores,
                [latents[2 * index + i] for i in order],
                [pngs[2 * index + i] for i in order] if pngs else [],
                {},
            ),
        }


def _sides(candidates, scores, latents, pngs, columns) -> Row:
    row = {}
    for index, side in enumerate(("chosen", "rejected")):
        row[f"{side}_latents"] = latents[index]
        row[f"{side}_candidate"] = candidates[index]
        row[f"{side}_score"] = scores[index]
        if pngs:
            row[f"{side}_image"] = pngs[index]
        for name, values in columns.items():
            row[f"{side}_scores/{name}"] = values[index]
    return row


def _ranking(candidates, scores, latents, pngs, columns) -> Row:
    row = {
        "candidates": np.array(candidates, np.int32),
        "latents": np.stack(latents),
        "scores": np.array(scores, np.float32),
    }
    if pngs:
        row["images"] = pngs
    return row | {
        f"columns/{name}": np.array(values, np.float32) for name, values in columns.items()
    }
