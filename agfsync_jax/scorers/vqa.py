"""VQA score: BLIP-2 answers questions about an image; how many answers are the expected ones.

AGFSync's faithfulness score (An et al. 2024, share of "yes" of yes-only questions) and TIFA's (Hu
et al. 2023, share of right choices) are both this score. Instead of generating text and mapping it
to a choice, the choices themselves are scored: one encoder pass and one decoder step where each
choice is a single token.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from agfsync_jax.data.images import preprocessing, resize_and_normalize
from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    infer_shardings,
    replicated,
)
from agfsync_jax.utils.paths import local_files, resolve_path
from agfsync_jax.utils.weights import load_model

PROMPT = "Question: {question} Choices:{choices} Answer:"  # AGFSync's; choices as ['yes','no']
SCORES = ("accuracy", "probability")
_YES_NO = {"yes", "no"}


class Scorer:
    """Column vqa, float32 [b] in 0..1, and the answers behind it.

    The vision tower and the Q-Former read an image once, whatever the number of its questions.

    Args:
        mesh: batches are split over its data and fsdp axes.
        path: a BLIP-2 folder in transformers' layout (T5 text model, tokenizer.json,
            preprocessor_config.json), or micro:NAME.
        batch_size: images at a time, rounded up to what the mesh divides.
        questions_per_batch: questions at a time, 2 * batch_size by default.
        prompt: what the model is asked, with the fields {question} and {choices}.
        score: "accuracy": share of questions whose likeliest choice is the expected answer;
            "probability": mean probability of the expected answer, over the question's choices.
        dtype: of computation and weights.
        sharding: (path regex, axes) rules for weights that one device cannot hold.

    Raises:
        FileNotFoundError, ValueError: the folder is not there or is no BLIP-2 with T5; a prompt
            with other fields, or another score.
    """

    asks_questions = True

    def __init__(
        self,
        mesh: Mesh,
        *,
        path: str,
        batch_size: int = 64,
        questions_per_batch: int | None = None,
        prompt: str = PROMPT,
        score: str = "accuracy",
        dtype: str = "float32",
        sharding: Sequence = (),
    ):
        fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
        if "question" not in fields or fields - {"question", "choices"}:
            raise ValueError(
                f"prompt {prompt!r} has the fields {sorted(fields)}: it takes {{question}}, and"
                " {choices} if wanted"
            )
        if score not in SCORES:
            raise ValueError(f"score is {score!r}, expected one of {', '.join(SCORES)}")
        source = resolve_path(path)
        folder = local_files(source)
        self._prompt, self._score = prompt, score
        self._tokenizer = TextTokenizer(folder)
        self._texts: dict[str, list[int]] = {}  # token ids of questions and choices
        resize = preprocessing(folder)
        dtype = jnp.dtype(dtype)
        graph, self._params = load_model(
            Blip2ForConditionalGeneration,
            source,
            dtype=dtype,
            param_dtype=dtype,
            shardings=lambda abstract: infer_shardings(abstract, mesh, sharding),
        )
        shards = batch_shards(mesh)
        self._image_batch = -(-batch_size // shards) * shards
        self._question_batch = -(-(questions_per_batch or 2 * batch_size) // shards) * shards
        self._by_row = batch_sharding(mesh)
        # Padded sizes only grow, so that few shapes are compiled however batches differ.
        self._question_length, self._num_choices, self._choice_length = 8, 2, 4

        def read_images(params: nnx.State, images: UInt8[Array, "b h w 3"]):
            pixels = resize_and_normalize(images, **resize)
            return nnx.merge(graph, params).get_image_tokens(pixels)

        def score_choices(params: nnx.State, image_tokens: Array, batch: Mapping[str, Array]):
            return choice_log_probs(nnx.merge(graph, params), image_tokens, **batch)

        # every question's device must see every image
        self._read_images = jax.jit(read_images, out_shardings=replicated(mesh))
        self._score_choices = jax.jit(score_choices)

    def __call__(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """Scores images of any one size; question rows need question, choices and answer.

        Returns:
            vqa: float32 [b]. answers: for each image a list of dicts, one a question: question,
            expected, answer (the likeliest choice), p_answer and p_expected (their probabilities
            among the choices), p_yes (nan unless it is a yes/no question), correct.

        Raises:
            ValueError: an image without questions, or a question whose expected answer is not
                among its choices or whose choices the tokenizer cannot tell apart.
        """
        rows = [(image, row) for image, asked in enumerate(questions) for row in asked]
        self._check(questions)
        results = [np.empty(0)] * len(rows)
        waiting = None  # the batch that the device works on while the next one is prepared
        for indices, log_probs in self._dispatch(np.asarray(images), rows):
            if waiting is not None:
                self._collect(results, rows, *waiting)
            waiting = indices, log_probs
        if waiting is not None:
            self._collect(results, rows, *waiting)
        answers: list[list[dict]] = [[] for _ in questions]
        for (image, row), probs in zip(rows, results, strict=True):
            answers[image].append(read_answer(row, probs))
        key = "correct" if self._score == "accuracy" else "p_expected"
        means = [np.mean([answer[key] for answer in of_image]) for of_image in answers]
        return {"vqa": np.array(means, np.float32), "answers": answers}

    def _check(self, questions: Sequence[Sequence[Mapping[str, Any]]]) -> None:
        """Raises ValueError for what cannot be scored, before any device time is spent."""
        if silent := [image for image, asked in enumerate(questions) if not asked]:
            raise ValueError(
                f"image {silent[0]} of the batch has no question ({len(silent)} of"
                f" {len(questions)} have none): ask at least one, or leave the image out"
            )
        checked = set()
        for row in (row for asked in questions for row in asked):
            choices = tuple(row["choices"])
            if row["answer"] not in choices:
                raise ValueError(
                    f"question {row['question']!r} expects {row['answer']!r}, which is not among"
                    f" its choices {list(choices)}"
                )
            if choices not in checked:
                checked.add(choices)
                if len({tuple(self._encode(choice)) for choice in choices}) < len(choices):
                    raise ValueError(
                        f"choices {list(choices)} are not all different for the tokenizer:"
                        " reword them"
                    )

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        key = text, special
        if key not in self._texts:
            self._texts[key] = self._tokenizer.encode(text, special=special)
        return self._texts[key]

    def _ask(self, row: Mapping[str, Any]) -> list[int]:
        choices = ",".join(f"'{choice}'" for choice in row["choices"])
        text = self._prompt.format(question=row["question"], choices=f"[{choices}]")
        return self._encode(text, special=True)

    def _dispatch(self, images: np.ndarray, rows: list) -> Iterator[tuple[list[int], Array]]:
        """Starts the work and yields (indices into rows, log-probabilities being computed)."""
        short, long = [], []  # questions whose choices are single tokens; the others
        for index, (_, row) in enumerate(rows):
            single = all(len(self._encode(choice)) == 1 for choice in row["choices"])
            (short if single else long).append(index)
        tokens = {index: self._ask(row) for index, (_, row) in enumerate(rows)}
        grow = self._grow
        grow("_question_length", max(map(len, tokens.values()), default=0), 8)
        grow("_num_choices", max((len(row["choices"]) for _, row in rows), default=0), 2)
        if long:
            texts = {choice for index in long for choice in rows[index][1]["choices"]}
            grow("_choice_length", max(len(self._encode(text)) for text in texts) + 1, 4)
        for start in range(0, len(images), self._image_batch):
            batch = images[start : start + self._image_batch]
            batch = np.concatenate([batch, np.repeat(batch[:1], self._image_batch - len(batch), 0)])
            image_tokens = self._read_images(self._params, jax.device_put(batch, self._by_row))
            for indices, size, length in (
                (short, self._question_batch, 1),
                (long, self._long_batch(), self._choice_length),
            ):
                here = [i for i in indices if start <= rows[i][0] < start + self._image_batch]
                for first in range(0, len(here), size):
                    part = here[first : first + size]
                    made = self._question_arrays(part, rows, tokens, start, size, length)
                    made = jax.device_put(made, self._by_row)
                    yield part, self._score_choices(self._params, image_tokens, made)

    def _grow(self, name: str, needed: int, multiple: int) -> None:
        setattr(self, name, max(getattr(self, name), -(-needed // multiple) * multiple))

    def _long_batch(self) -> int:
        """Questions at a time where each choice is decoded on its own."""
        shards = self._by_row.mesh.size // self._by_row.mesh.shape["tensor"]
        return max(1, self._question_batch // self._num_choices // shards) * shards

    def _question_arrays(self, part, rows, tokens, start, size, length) -> dict[str, np.ndarray]:
        """Arrays of `size` questions; those beyond `part` repeat its first."""
        filled = part + part[:1] * (size - len(part))
        ids = np.full((size, self._question_length), self._tokenizer.pad_id, np.int32)
        mask = np.zeros_like(ids)
        choices = np.zeros((size, self._num_choices, length), np.int32)
        choice_mask = np.zeros_like(choices)
        end = [] if length == 1 else [self._tokenizer.eos_id]
        for at, index in enumerate(filled):
            ids[at, : len(tokens[index])], mask[at, : len(tokens[index])] = tokens[index], 1
            for choice, text in enumerate(rows[index][1]["choices"]):
                answer = self._encode(text) + end
                choices[at, choice, : len(answer)] = answer
                choice_mask[at, choice, : len(answer)] = 1
        image = np.array([rows[index][0] - start for index in filled], np.int32)
        return {
            "image": image,
            "ids": ids,
            "mask": mask,
            "choices": choices,
            "choice_mask": choice_mask,
        }

    def _collect(self, results: list, rows: list, indices: list[int], log_probs: Array) -> None:
        values = np.exp(np.asarray(log_probs, np.float64))
        for index, probs in zip(indices, values, strict=False):
            results[index] = probs[: len(rows[index][1]["choices"])]


def choice_log_probs(
    model: Blip2ForConditionalGeneration,
    image_tokens: Float[Array, "b n d"],
    image: Array,
    ids: Array,
    mask: Array,
    choices: Array,
    choice_mask: Array,
) -> Float[Array, "q c"]:
    """Log-probabilities of the choices [q, c, t] of each question [q, s], normalized over them.

    With t = 1 a choice is its only token; with t > 1 the log-probabilities of its tokens, the end
    token included, are summed. `image` [q] says which of the images a question is about.
    """
    language_model = model.language_model
    start_id = language_model.config.decoder_start_token_id
    hidden, mask = model.encode(image_tokens[image], ids, mask)
    questions, count, length = choices.shape
    start = jnp.full((questions, count, 1), start_id, choices.dtype)
    if length == 1:
        logits = language_model.decode(start[:, 0], hidden, mask)  # [q, 1, vocab]
        totals = jnp.take_along_axis(logits[:, 0], choices[:, :, 0], axis=-1)
    else:
        shifted = jnp.concatenate([start, choices[:, :, :-1]], axis=-1)
        logits = language_model.decode(
            shifted.reshape(questions * count, length),
            jnp.repeat(hidden, count, axis=0),
            jnp.repeat(mask, count, axis=0),
        ).reshape(questions, count, length, -1)
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        log_probs = jnp.take_along_axis(log_probs, choices[..., None], axis=-1)[..., 0]
        totals = jnp.sum(log_probs * choice_mask, axis=-1)
    return jax.nn.log_softmax(jnp.where(choice_mask[:, :, 0] > 0, totals, -jnp.inf), axis=-1)


def read_answer(row: Mapping[str, Any], probs: Float[np.ndarray, " c"]) -> dict[str, Any]:
    """What the probabilities of a question's choices say, as one entry of `answers`."""
    choices = list(row["choices"])
    answer = choices[int(np.argmax(probs))]
    by_choice = {choice.lower(): float(p) for choice, p in zip(choices, probs, strict=True)}
    return {
        "question": row["question"],
        "expected": row["answer"],
        "answer": answer,
        "p_answer": float(probs.max()),
        "p_expected": float(probs[choices.index(row["answer"])]),
        "p_yes": by_choice["yes"] if by_choice.keys() == _YES_NO else float("nan"),
        "correct": answer == row["answer"],
    }
