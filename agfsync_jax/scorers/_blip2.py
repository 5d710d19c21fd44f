"""BLIP-2 as the scorers ask it: an image is read once, its questions go in batches of one length.

A question costs one pass of the encoder and one step of the decoder where its choices are single
tokens; what several longer choices have in common is computed once. The shapes of a batch follow
from its own questions alone, so the same questions give the same bytes whatever ran before.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from agfsync_jax.data.images import preprocessing, resize_and_normalize
from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    infer_shardings,
    replicated,
    round_up,
)
from agfsync_jax.weights.networks import load_model
from agfsync_jax.weights.places import local_files, resolve_path

LENGTH_MULTIPLE = 8  # of the tokens of a batch's questions: how many shapes are compiled
_DECODED = 16  # tokens of all choices of a question, up to which a batch is whole


class Question(NamedTuple):
    """What is asked about an image of a batch."""

    image: int  # its index in the batch
    text: str  # the whole prompt
    choices: tuple[str, ...] = ()  # the answers that are compared; none for free text


class Blip2:
    """A BLIP-2 with T5 on the mesh, and its tokenizer and image processor.

    Its settings are those of scorers/vqa.py.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        path: str,
        batch_size: int,
        questions_per_batch: int | None = None,
        dtype: str = "float32",
        sharding: Sequence = (),
    ):
        source = resolve_path(path)
        folder = local_files(source)
        self._tokenizer = TextTokenizer(folder)
        # Token ids; with `special` the end token too. Millions of questions need not be kept.
        encode = functools.partial(self._tokenizer.encode, special=False)
        self.encode = functools.lru_cache(2**20)(encode)
        dtype = jnp.dtype(dtype)
        graph, self._params = load_model(
            Blip2ForConditionalGeneration,
            source,
            dtype=dtype,
            param_dtype=dtype,
            shardings=functools.partial(infer_shardings, mesh=mesh, rules=sharding),
        )
        self._shards = batch_shards(mesh)
        self._image_batch = round_up(batch_size, self._shards)
        self._question_batch = round_up(questions_per_batch or 2 * batch_size, self._shards)
        self._by_row = batch_sharding(mesh)
        self._read_images, self._score, self._generate = programs(
            graph, mesh, preprocessing(folder)
        )
        self._seen: UInt8[np.ndarray, "b h w 3"] | None = None  # the images last read,
        self._tokens: list[Array] = []  # and their tokens, a batch of images each

    def choice_log_probs(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        questions: Sequence[Question],
        *,
        end: bool = False,
    ) -> list[Float[np.ndarray, " c"]]:
        """The log-probability of every choice of each question, among all texts.

        The log-probabilities of a choice's tokens are summed. The end token counts as one of them
        where `end` is set, and where any choice of the question has several.
        """
        encoded = [[self.encode(choice) for choice in q.choices] for q in questions]
        longest = [max(map(len, ids)) + (end or max(map(len, ids)) > 1) for ids in encoded]

        def shape(index: int) -> tuple[int, int]:
            """Choices and tokens of a choice, of the batch that the question is in."""
            count, length = len(encoded[index]), longest[index]
            if length == 1:  # many choices cost nothing
                return round_up(count, 4), 1
            return round_up(count, 2), round_up(length, 2)

        def arrays(part: list[int], size: int) -> dict[str, np.ndarray]:
            count, length = shape(part[0])
            ids = np.zeros((size, count, length), np.int32)
            mask = np.zeros_like(ids)
            for row, index in enumerate(part):
                for choice, tokens in enumerate(encoded[index]):
                    tokens = tokens + [self._tokenizer.eos_id] * (end or longest[index] > 1)
                    ids[row, choice, : len(tokens)] = tokens
                    mask[row, choice, : len(tokens)] = 1
            return {"choices": ids, "choice_mask": mask}

        results: list[np.ndarray] = [np.empty(0)] * len(questions)
        started = self._started(images, questions, shape, arrays, self._score)
        for part, totals in _one_late(started):
            for index, row in zip(part, np.asarray(totals, np.float64), strict=False):
                results[index] = row[: len(questions[index].choices)]
        return results

    def answers(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        questions: Sequence[Question],
        *,
        max_new_tokens: int,
    ) -> list[str]:
        """Free text, greedy: what transformers' `generate` gives without beams or sampling."""

        def generate(*args: Any) -> Array:
            return self._generate(*args, max_new_tokens)

        results = [""] * len(questions)
        started = self._started(images, questions, lambda _: (1, 1), lambda *_: {}, generate)
        for part, ids in _one_late(started):
            for index, row in zip(part, np.asarray(ids), strict=False):
                results[index] = self._tokenizer.decode(row).strip()
        return results

    def can_tell_apart(self, choices: Sequence[str]) -> bool:
        """Whether the choices are different for the tokenizer, and none is empty."""
        ids = {tuple(self.encode(choice)) for choice in choices}
        return len(ids) == len(choices) and () not in ids

    def _started(
        self,
        images: np.ndarray,
        questions: Sequence[Question],
        shape: Callable[[int], tuple[int, int]],
        arrays: Callable[[list[int], int], dict[str, np.ndarray]],
        program: Callable[..., Array],
    ) -> Iterator[tuple[list[int], Array]]:
        """(indices of questions, what the program makes of them), in some order."""
        texts = [self.encode(question.text, special=True) for question in questions]
        lengths = [round_up(len(ids), LENGTH_MULTIPLE) for ids in texts]
        tokens = self._image_tokens(images)

        def key(index: int) -> tuple[int, tuple[int, int]]:
            """The batch of images, and the shape of the choices."""
            return questions[index].image // self._image_batch, shape(index)

        # The shortest last: where a batch is not full, that costs least.
        order = sorted(range(len(questions)), key=lambda i: (key(i), -lengths[i], i))
        parts = [
            (group, size, members[start : start + size])
            for (group, of_choices), found in itertools.groupby(order, key)
            for members, size in [(list(found), self._size(of_choices))]
            for start in range(0, len(members), size)
        ]
        for group, size, part in parts:
            ids = np.full((size, lengths[part[0]]), self._tokenizer.pad_id, np.int32)
            mask = np.zeros_like(ids)
            for row, index in enumerate(part):
                ids[row, : len(texts[index])], mask[row, : len(texts[index])] = texts[index], 1
            of = [questions[index].image - group * self._image_batch for index in part]
            batch = {"image": np.array(of + [0] * (size - len(of)), np.int32)}
            batch |= {"ids": ids, "mask": mask} | arrays(part, size)
            batch = jax.device_put(batch, self._by_row)
            yield part, program(self._params, tokens[group], batch)

    def _size(self, shape: tuple[int, int]) -> int:
        """Questions at a time: fewer where their choices are long."""
        smaller = max(1, shape[0] * shape[1] // _DECODED)
        return round_up(math.ceil(self._question_batch / smaller), self._shards)

    def _image_tokens(self, images: np.ndarray) -> list[Array]:
        if images is not self._seen:
            self._tokens = []
            for start in range(0, len(images), self._image_batch):
                batch = filled(images[start : start + self._image_batch], self._image_batch)
                batch = jax.device_put(batch, self._by_row)
                self._tokens.append(self._read_images(self._params, batch))
            self._seen = images
        return self._tokens


def _one_late(batches: Iterable) -> Iterator:
    """The same, read when the next is started: the device works while the host prepares it."""
    return (batch for batch, _ in itertools.pairwise(itertools.chain(batches, [None])))


def programs(
    graph: nnx.GraphDef, mesh: Mesh, resize: Mapping[str, Any]
) -> tuple[Callable, Callable, Callable]:
    """The three compiled functions of a `Blip2ForConditionalGeneration`.

    Args:
        resize: how images are made; see data/images.py, `preprocessing`.

    Returns:
        read_images(params, images uint8 [b, h, w, 3]) -> tokens [b, n, d] on every device;
        score(params, tokens, batch) -> see `choice_log_probs`;
        generate(params, tokens, batch, max_new_tokens) -> int32 [q, max_new_tokens].
    """

    def read_images(params: nnx.State, images: UInt8[Array, "b h w 3"]):
        pixels = resize_and_normalize(images, **resize)
        return nnx.merge(graph, params).get_image_tokens(pixels)

    def score(params: nnx.State, image_tokens: Array, batch: Mapping[str, Array]):
        return choice_log_probs(nnx.merge(graph, params), image_tokens, **batch)

    def generate(params, image_tokens, batch, max_new_tokens: int):
        model = nnx.merge(graph, params)
        tokens = image_tokens[batch["image"]]
        return model.generate(tokens, batch["ids"], batch["mask"], max_new_tokens)

    return (
        # every question's device must see every image
        jax.jit(read_images, out_shardings=replicated(mesh)),
        jax.jit(score),
        jax.jit(generate, static_argnums=3),
    )


def choice_log_probs(
    model: Blip2ForConditionalGeneration,
    image_tokens: Float[Array, "b n d"],
    image: Int[Array, " q"],
    ids: Int[Array, "q s"],
    mask: Int[Array, "q s"],
    choices: Int[Array, "q c t"],
    choice_mask: Int[Array, "q c t"],
) -> Float[Array, "q c"]:
    """The summed log-probabilities of the tokens of each choice; 0 where there is no choice.

    `image` says which of the images a question is about.
    """
    language_model = model.language_model
    hidden, mask = model.encode(image_tokens[image], ids, mask)
    questions, count, length = choices.shape
    start = jnp.full((questions, count, 1), language_model.config.decoder_start_token_id)
    if length == 1:  # all choices are read from one step
        logits = language_model.decode(start[:, 0], hidden, mask)  # [q, 1, vocab]
        log_probs = jax.nn.log_softmax(logits[:, 0], axis=-1)
        return jnp.take_along_axis(log_probs, choices[:, :, 0], axis=-1)
    shifted = jnp.concatenate([start, choices[:, :, :-1]], axis=-1)
    shifted = shifted.reshape(questions, count * length)
    logits = language_model.decode(shifted, hidden, mask, parts=count)
    log_probs = jax.nn.log_softmax(logits, axis=-1).reshape(questions, count, length, -1)
    log_probs = jnp.take_along_axis(log_probs, choices[..., None], axis=-1)[..., 0]
    return jnp.sum(log_probs * choice_mask, axis=-1)
