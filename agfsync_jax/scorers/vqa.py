"""VQA score: BLIP-2 answers questions about an image; how many answers are the expected ones.

AGFSync's faithfulness score (An et al. 2024, share of "yes" of yes-only questions) and TIFA's (Hu
et al. 2023, share of right choices) are both this score. By default nothing is generated: the
choices themselves are compared, at one encoder pass and one decoder step where each is a single
token. `answer_by="generation"` lets the model write, greedily, and maps what it wrote to a choice,
as TIFA does (whose BLIP-2, of LAVIS, searches with 5 beams instead).

AGFSync's released code counts any answer with a "b" in it as no; here an answer is right if it is
the expected one.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from agfsync_jax import scorers
from agfsync_jax.data.columns import Column
from agfsync_jax.scorers._blip2 import Blip2, Question
from agfsync_jax.scorers._shared import shared
from agfsync_jax.texts import sentences
from agfsync_jax.weights.places import is_local, resolve_path

PROMPT = "Question: {question} Choices:{choices} Answer:"  # AGFSync's; choices as ['yes','no']
TIFA_PROMPT = (  # for answer_by="generation"; options as: yes, no
    "Answer the multiple-choice question. Question: {question} Choices: {options} Answer:"
)
FIELDS = ("question", "choices", "options")
SCORES = ("accuracy", "probability", "geometric_mean")
ANSWER_BY = ("likelihood", "generation")
_YES_NO = {"yes", "no"}


class Scorer(scorers.Scorer):
    """Column vqa, float32 [b] in 0..1, and the answers behind it.

    The vision tower and the Q-Former read an image once, whatever the number of its questions.

    Args:
        mesh: batches are split over its data and fsdp axes.
        path: a BLIP-2 folder in transformers' layout (T5 text model, tokenizer.json,
            preprocessor_config.json), or micro:NAME.
        batch_size: images at a time, rounded up to what the mesh divides.
        questions_per_batch: questions at a time, 2 * batch_size by default.
        dtype: of computation and weights, float32 by default.
        sharding: (path regex, axes) rules for weights that one device cannot hold.
        prompt: what the model is asked, with the fields {question} and {choices} (['yes','no']) or
            {options} (yes, no).
        answer_by: "likelihood": the likeliest choice. "generation": what the model writes, which
            must be a choice to the letter; if it is none, the closest choice counts.
        closest: where an answer is written: the folder of a sentence encoder, a BERT or an MPNet,
            whose cosine says which choice is the closest, such as
            sentence-transformers/all-mpnet-base-v2, TIFA's.
            Empty: the choice that is the likeliest for BLIP-2 itself.
        max_new_tokens: of a written answer.
        score: "accuracy": share of questions whose answer is the expected one; "probability":
            mean probability of the expected answer, over the question's choices (mean p_yes of
            yes-only questions); "geometric_mean" of the same.

    Raises:
        FileNotFoundError, ValueError: the folder is not there or is no BLIP-2 with T5; a prompt
            with other fields, or settings that do not exist or do not go together.
    """

    columns = {
        "vqa": Column(
            "questions about the image that the VQA model answers as the prompt expects", "%"
        )
    }
    asks_questions = True
    _rest_goes_to = Blip2

    @classmethod
    def check(
        cls,
        *,
        prompt: str = PROMPT,
        answer_by: str = "likelihood",
        score: str = "accuracy",
        closest: str = "",
        **_: Any,
    ) -> None:
        fields = {field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None}
        if "question" not in fields or fields - set(FIELDS):
            raise ValueError(
                f"prompt {prompt!r} has the fields {sorted(fields)}: it takes {{question}}, and"
                " {choices} or {options} if wanted"
            )
        if score not in SCORES:
            raise ValueError(f"score is {score!r}, expected one of {', '.join(SCORES)}")
        if answer_by not in ANSWER_BY:
            raise ValueError(f"answer_by is {answer_by!r}, expected one of {', '.join(ANSWER_BY)}")
        if answer_by == "generation" and score != "accuracy":
            raise ValueError(
                f"score={score!r} needs the choices' probabilities, which written answers do not"
                " have: set score='accuracy' or answer_by='likelihood'"
            )
        if closest and answer_by != "generation":
            raise ValueError(
                f"closest={closest!r} is for written answers: set answer_by='generation', or leave"
                " it empty"
            )
        if closest and is_local(closest):
            sentences.check(resolve_path(closest))

    def __init__(
        self,
        mesh: Mesh,
        *,
        batch_size: int = 64,
        prompt: str = PROMPT,
        answer_by: str = "likelihood",
        closest: str = "",
        max_new_tokens: int = 30,
        score: str = "accuracy",
        **model: Any,
    ):
        self.check(prompt=prompt, answer_by=answer_by, score=score, closest=closest)
        self._prompt, self._score, self._writes = prompt, score, answer_by == "generation"
        self._max_new_tokens = max_new_tokens
        self._sentences = sentences.SentenceEncoder(closest, mesh=mesh) if closest else None
        self._model = shared(Blip2, mesh, batch_size=batch_size, **model)

    def __call__(
        self,
        images: UInt8[np.ndarray, "b h w 3"],
        prompts: Sequence[str],
        questions: Sequence[Sequence[Mapping[str, Any]]],
    ) -> dict[str, Any]:
        """Scores images of any one size; question rows need question, choices and answer.

        Returns:
            vqa: float32 [b], the mean over the questions that have an answer; nan where none has.
            answers: for each image a list of dicts, one a question: question, expected, answer
            (None if there is none: choices that the tokenizer cannot tell apart, or a model that
            gives no finite number), p_answer and p_expected (their probabilities among the
            choices), p_yes (nan unless it is a yes/no question), correct; and "written", the
            answer before it is mapped to a choice, if the model writes.
        """
        asked = [
            Question(image, ask(self._prompt, row), tuple(row["choices"]))
            for image, of_image in enumerate(questions)
            for row in of_image
        ]
        read = self._written(images, asked) if self._writes else self._likeliest(images, asked)
        found = iter(read)
        answers = [[answer_row(row, **next(found)) for row in of_image] for of_image in questions]
        scores = [self._mean(of_image) for of_image in answers]
        return {"vqa": np.array(scores, np.float32), "answers": answers}

    def _likeliest(self, images: np.ndarray, asked: Sequence[Question]) -> list[dict]:
        """{"probs"} of each question; {} where the choices are the same to the tokenizer."""
        clear = [i for i, q in enumerate(asked) if self._model.can_tell_apart(q.choices)]
        found: list[dict] = [{} for _ in asked]
        log_probs = self._model.choice_log_probs(images, [asked[i] for i in clear])
        for index, values in zip(clear, log_probs, strict=True):
            probs = np.exp(values - values.max())
            found[index] = {"probs": probs / probs.sum()}
        return found

    def _written(self, images: np.ndarray, asked: Sequence[Question]) -> list[dict]:
        """{"written", "answer"} of each question."""
        texts = self._model.answers(images, asked, max_new_tokens=self._max_new_tokens)
        other = [
            i for i, (text, q) in enumerate(zip(texts, asked, strict=True)) if text not in q.choices
        ]
        if self._sentences:
            nearest = self._sentences.closest([(texts[i], asked[i].choices) for i in other])
        else:
            found = self._likeliest(images, [asked[i] for i in other])
            nearest = [best(asked[i].choices, **each) for i, each in zip(other, found, strict=True)]
        answers = dict(enumerate(texts)) | dict(zip(other, nearest, strict=True))
        return [{"written": text, "answer": answers[i]} for i, text in enumerate(texts)]

    def _mean(self, answers: Sequence[Mapping[str, Any]]) -> float:
        answered = [answer for answer in answers if answer["answer"] is not None]
        if not answered:
            return np.nan
        key = "correct" if self._score == "accuracy" else "p_expected"
        values = np.array([answer[key] for answer in answered], np.float64)
        if self._score == "geometric_mean":
            return float(np.exp(np.log(np.maximum(values, np.finfo(np.float32).tiny)).mean()))
        return float(values.mean())


def ask(prompt: str, row: Mapping[str, Any]) -> str:
    """What the model is asked: `prompt` with a question and its choices in it."""
    quoted = ",".join(f"'{choice}'" for choice in row["choices"])
    return prompt.format(
        question=row["question"], choices=f"[{quoted}]", options=", ".join(row["choices"])
    )


def best(choices: Sequence[str], probs: Float[np.ndarray, " c"] | None = None) -> str | None:
    """The likeliest choice, None where the probabilities are not there or not finite."""
    finite = probs is not None and np.isfinite(probs).all()
    return choices[int(np.argmax(probs))] if finite else None


def answer_row(
    row: Mapping[str, Any],
    *,
    probs: Float[np.ndarray, " c"] | None = None,
    answer: str | None = None,
    written: str | None = None,
) -> dict[str, Any]:
    """One entry of `answers`, from the probabilities of a question's choices or from its answer."""
    choices, nan = list(row["choices"]), float("nan")
    by_choice = dict.fromkeys(choices, nan)
    if likeliest := best(choices, probs):
        answer = likeliest
        by_choice = {choice: float(p) for choice, p in zip(choices, probs, strict=True)}
    lower = {choice.lower(): p for choice, p in by_choice.items()}
    made = {
        "question": row["question"],
        "expected": row["answer"],
        "answer": answer,
        "p_answer": by_choice.get(answer, nan),
        "p_expected": by_choice.get(row["answer"], nan),
        "p_yes": lower["yes"] if lower.keys() == _YES_NO else nan,
        "correct": answer == row["answer"],
    }
    return made if written is None else made | {"written": written}
