"""The VQA score equals what transformers' own processor and model make of the same folder."""

import itertools

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from agfsync_jax.data.images import preprocessing, resize_and_normalize
from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.questions import fixed_questions
from agfsync_jax.micro.scenes import sample_scenes
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers import vqa, vqascore
from agfsync_jax.weights.networks import load_model
from agfsync_jax.weights.places import resolve_path
from tests.twins import blip2_folder, transformers_answers

SHIPPED = resolve_path("micro:blip2")
YES_NO = ["yes", "no"]
QUESTIONS = [
    ("Is there a red circle?", YES_NO, "yes"),
    ("what color is the square ?", ["red", "blue", "dark"], "blue"),
    ("where is the circle", ["above the square", "below", "left of the square"], "below"),
    ("Is the square blue?", YES_NO, "no"),
    ("is there a circle left of the blue square ?", ["no", "yes"], "no"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    blip2_folder(folder)
    return folder


@pytest.fixture(scope="module")
def mesh():
    return create_mesh({"data": -1})


@pytest.fixture(scope="module")
def scorer(folder, mesh):
    return vqa.Scorer(
        mesh, path=str(folder), prompt="{question}", score="probability", batch_size=8
    )


def rows(*numbers):
    names = ("question", "choices", "answer")
    return [dict(zip(names, QUESTIONS[number], strict=True)) for number in numbers]


def draw(number, size=16):
    return np.random.default_rng(0).integers(0, 256, (number, size, size, 3)).astype(np.uint8)


def compare(folder, images, questions, prompt, scores, *, atol):
    """Every probability and answer of `scores` against transformers."""
    flat = [(image, row) for image, asked in enumerate(questions) for row in asked]
    texts = [
        prompt.format(question=row["question"], choices=str(row["choices"]).replace(", ", ","))
        for _, row in flat
    ]
    probabilities, greedy = transformers_answers(
        folder, [images[image] for image, _ in flat], texts, [row["choices"] for _, row in flat]
    )
    answers = list(itertools.chain.from_iterable(scores["answers"]))
    for (_, row), answer, expected in zip(flat, answers, probabilities, strict=True):
        assert answer["question"] == row["question"]
        assert answer["answer"] == row["choices"][expected.argmax()]
        assert answer["correct"] == (answer["answer"] == row["answer"] == answer["expected"])
        np.testing.assert_allclose(answer["p_answer"], expected.max(), atol=atol)
        at = row["choices"].index(row["answer"])
        np.testing.assert_allclose(answer["p_expected"], expected[at], atol=atol)
        if set(row["choices"]) == {"yes", "no"}:
            np.testing.assert_allclose(
                answer["p_yes"], expected[row["choices"].index("yes")], atol=atol
            )
        else:
            assert np.isnan(answer["p_yes"])
    return greedy


@pytest.mark.parametrize(
    ("prompt", "size"),
    [("{question}", 16), (vqa.PROMPT, 24)],  # 24 is resized to the tower's 16
    ids=["bare", "agfsync"],
)
def test_equals_transformers(folder, mesh, prompt, size):
    images = draw(3, size)
    questions = [rows(0, 1, 2), rows(3), rows(2, 4, 0, 1)]
    scorer = vqa.Scorer(mesh, path=str(folder), prompt=prompt, batch_size=2)
    scores = scorer(images, [""] * 3, questions)
    compare(folder, images, questions, prompt, scores, atol=2e-5)
    expected = [np.mean([answer["correct"] for answer in a]) for a in scores["answers"]]
    np.testing.assert_allclose(scores["vqa"], expected, rtol=1e-6)
    assert scores["vqa"].dtype == np.float32


def test_an_image_scores_the_same_in_any_batch(scorer):
    """More images than a batch, more questions than a batch, other neighbours."""
    images = draw(19)
    questions = [rows(*(np.arange(1 + i % 4) + i) % 5) for i in range(19)]
    scores = scorer(images, [""] * 19, questions)
    together = scores["vqa"]
    expected = [np.mean([answer["p_expected"] for answer in a]) for a in scores["answers"]]
    np.testing.assert_allclose(together, expected, rtol=1e-6)
    for index in (0, 7, 18):
        part = slice(index, index + 1)
        alone = scorer(images[part], [""], questions[part])["vqa"]
        np.testing.assert_allclose(alone, together[part], atol=1e-5)
    assert together.std() > 0.01


def test_an_image_is_read_once(scorer, monkeypatch):
    read, calls = scorer._model._read_images, []
    monkeypatch.setattr(
        scorer._model,
        "_read_images",
        lambda p, images: calls.append(len(images)) or read(p, images),
    )
    scorer(draw(8), [""] * 8, [rows(*range(5)) * 4] * 8)
    assert calls == [8]


def test_weights_may_be_sharded(folder, scorer):
    mesh = create_mesh({"data": 4, "tensor": 2})
    rules = [(r"DenseReluDense\.wi\.kernel", (None, "tensor"))]
    split = vqa.Scorer(
        mesh,
        path=str(folder),
        prompt="{question}",
        score="probability",
        batch_size=8,
        sharding=rules,
    )
    asked = draw(2), [""] * 2, [rows(0, 2), rows(1)]
    np.testing.assert_allclose(split(*asked)["vqa"], scorer(*asked)["vqa"], atol=1e-5)


def test_greedy_text_equals_transformers(folder):
    graph, params = load_model(Blip2ForConditionalGeneration, folder)
    tokenizer, images = TextTokenizer(folder), draw(5)
    texts = [question for question, _, _ in QUESTIONS]
    _, expected = transformers_answers(folder, images, texts, [YES_NO] * 5)

    @jax.jit
    def generate(params, images, ids, mask):
        model = nnx.merge(graph, params)
        pixels = resize_and_normalize(images, **preprocessing(folder))
        return model.generate(model.get_image_tokens(pixels), ids, mask, 6)

    made = generate(params, images, *tokenizer(texts, 16))
    assert [tokenizer.decode(ids) for ids in np.asarray(made)] == expected


def test_a_question_without_an_answer(scorer, monkeypatch):
    """Choices that are the same to the tokenizer, a model that gives NaN; neither counts."""
    unknown = {"question": "is it", "choices": ["apple", "pear"], "answer": "pear"}
    scores = scorer(draw(3), [""] * 3, [[unknown, *rows(0)], [unknown], []])
    first, second = scores["answers"][0]
    assert first["answer"] is None and not first["correct"] and np.isnan(first["p_expected"])
    assert scores["vqa"][0] == np.float32(second["p_expected"])
    assert np.isnan(scores["vqa"][1:]).all() and scores["answers"][2] == []
    monkeypatch.setattr(scorer._model, "_score", lambda *_: np.full((16, 4), np.nan))
    scores = scorer(draw(1), [""], [rows(0)])
    assert scores["answers"][0][0]["answer"] is None and np.isnan(scores["vqa"][0])


@pytest.mark.parametrize("score", ["accuracy", "probability", "geometric_mean"])
def test_scores(folder, mesh, scorer, score):
    other = vqa.Scorer(mesh, path=str(folder), prompt="{question}", score=score, batch_size=8)
    assert other._model is scorer._model  # loaded once
    made = other(draw(2), [""] * 2, [rows(0, 3, 1), rows(4)])
    for value, answers in zip(made["vqa"], made["answers"], strict=True):
        p = np.array([answer["p_expected"] for answer in answers])
        right = np.mean([answer["answer"] == answer["expected"] for answer in answers])
        expected = {
            "accuracy": right,
            "probability": p.mean(),
            "geometric_mean": p.prod() ** (1 / len(p)),
        }
        np.testing.assert_allclose(value, expected[score], rtol=1e-5)


def test_written_answers(folder, mesh):
    """TIFA's procedure: the text that transformers generates, or else the closest choice."""
    images, asked = draw(4), [rows(0, 1), rows(2), rows(3), rows(4, 0)]
    options = {"path": str(folder), "prompt": vqa.TIFA_PROMPT, "batch_size": 8}
    scorer = vqa.Scorer(mesh, **options, answer_by="generation", max_new_tokens=6)
    answers = list(itertools.chain.from_iterable(scorer(images, [""] * 4, asked)["answers"]))
    flat = [(image, row) for image, of in enumerate(asked) for row in of]
    texts = [
        f"Answer the multiple-choice question. Question: {row['question']} "
        f"Choices: {', '.join(row['choices'])} Answer:"
        for _, row in flat
    ]
    probabilities, greedy = transformers_answers(
        folder, [images[image] for image, _ in flat], texts, [row["choices"] for _, row in flat]
    )
    assert [answer["written"] for answer in answers] == greedy
    for (_, row), answer, text, probs in zip(flat, answers, greedy, probabilities, strict=True):
        nearest = text if text in row["choices"] else row["choices"][probs.argmax()]
        assert answer["answer"] == nearest

    class Sentences:
        def closest(self, pairs):
            return [choices[-1] for _, choices in pairs]

    scorer._sentences = Sentences()
    answers = list(itertools.chain.from_iterable(scorer(images, [""] * 4, asked)["answers"]))
    for (_, row), answer, text in zip(flat, answers, greedy, strict=True):
        assert answer["answer"] == (text if text in row["choices"] else row["choices"][-1])


def test_vqascore(folder, mesh):
    """exp(-mean cross entropy) of the answer and the end token, as transformers' loss has it."""
    from PIL import Image
    from transformers import Blip2ForConditionalGeneration as Twin
    from transformers import Blip2Processor

    images, prompts = draw(3), ["a {red} circle", "the blue square", "a circle"]
    scorer = vqascore.Scorer(mesh, path=str(folder), answer="yes", batch_size=8)
    processor, twin = Blip2Processor.from_pretrained(folder), Twin.from_pretrained(folder).eval()
    label = torch.tensor([processor.tokenizer("yes").input_ids])
    assert label.shape == (1, 2)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        text = f'Does this figure show "{prompt}"? Please answer yes or no.'
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        with torch.no_grad():
            expected.append(float(torch.exp(-twin(**inputs, labels=label).loss)))
    made = scorer(images, prompts, [[]] * 3)["vqascore"]
    np.testing.assert_allclose(made, expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected a question with \{prompt\} in it"):
        vqascore.Scorer(mesh, path=str(folder), prompt="is it?")


def test_shapes_are_few_and_follow_from_the_batch(folder, mesh):
    """What was asked before changes neither shapes nor, so, the bytes of what comes after."""
    long = [{**rows(0)[0], "question": "is there a circle " * 9}]
    images, asked = draw(8), [rows(*range(5)) for _ in range(8)]

    def make():
        model = vqa.Scorer(mesh, path=str(folder), batch_size=8)
        shapes, score = [], model._model._score
        model._model._score = lambda p, tokens, batch: (
            shapes.append((batch["ids"].shape, batch["choices"].shape)) or score(p, tokens, batch)
        )
        return model, shapes

    first, shapes = make()
    alone = first(images, [""] * 8, asked)
    assert len(shapes) == len(set(shapes)) == 3
    del first
    second, shapes = make()
    second(draw(1), [""], [long])
    np.testing.assert_array_equal(second(images, [""] * 8, asked)["vqa"], alone["vqa"])


def test_errors(folder, mesh):
    with pytest.raises(ValueError, match=r"takes \{question\}"):
        vqa.Scorer(mesh, path=str(folder), prompt="Q: {q}")
    with pytest.raises(ValueError, match="expected one of accuracy, probability"):
        vqa.Scorer(mesh, path=str(folder), score="mean")
    with pytest.raises(ValueError, match="expected one of likelihood, generation"):
        vqa.Scorer(mesh, path=str(folder), answer_by="vote")
    with pytest.raises(ValueError, match="needs the choices' probabilities"):
        vqa.Scorer(mesh, path=str(folder), answer_by="generation", score="probability")


@pytest.mark.skipif(
    not SHIPPED.is_dir(), reason=f"{SHIPPED} is made by `python -m agfsync_jax.micro.suite`"
)
def test_the_shipped_weights_equal_transformers(mesh):
    """transformers gives the answers that agfsync_jax gives, from the folder that ships."""
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 8)
    images = np.stack([render(scene, rng) for scene in scenes])
    questions = [fixed_questions(scene)[:8] for scene in scenes]  # 64 in all
    scorer = vqa.Scorer(mesh, path="micro:blip2", prompt="{question}", batch_size=8)
    scores = scorer(images, [""] * 8, questions)
    greedy = compare(SHIPPED, images, questions, "{question}", scores, atol=2e-5)
    answers = list(itertools.chain.from_iterable(scores["answers"]))
    same = [text == answer["answer"] for text, answer in zip(greedy, answers, strict=True)]
    assert len(same) == 64
    assert np.mean(same) > 0.9  # free text may be a word that was not offered
    writer = vqa.Scorer(
        mesh,
        path="micro:blip2",
        prompt="{question}",
        answer_by="generation",
        max_new_tokens=6,
        batch_size=8,
    )
    assert writer._model is scorer._model
    written = itertools.chain.from_iterable(writer(images, [""] * 8, questions)["answers"])
    assert [answer["written"] for answer in written] == greedy
