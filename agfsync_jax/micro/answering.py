"""Trains the micro BLIP-2 in the paper's order (Li et al. 2023): to see, to answer, then both.

The vision tower starts from CLIP's. First it and the Q-Former learn what of an image to pass on:
linear probes, thrown away afterwards, read facts of the scene from the tokens of single queries
(`probes.IN_QUERIES`). Then the language model learns to answer from those tokens. Without the first
part all queries come out alike, and questions of shape and place stay near chance for thousands of
steps.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.micro import folders, probes, training
from agfsync_jax.micro.drawing import degrade, render
from agfsync_jax.micro.grammar import Object, Scene
from agfsync_jax.micro.painter import Painter
from agfsync_jax.micro.questions import ELEMENT_TYPES, fixed_questions, training_questions
from agfsync_jax.micro.scenes import sample_scene, sample_scenes
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.scorers.vqa import Scorer
from agfsync_jax.weights import networks as weights

QUESTION_LENGTH = 16  # tokens of a question; the longest of the world has 13
START = 0  # the decoder starts with T5's padding token


def start_from_clip(params: nnx.State, clip: nnx.State, images: np.ndarray) -> None:
    """Copies CLIP's vision tower into BLIP-2's, in place.

    BLIP-2 has no norm before its first block: CLIP's is folded into the embeddings, with the mean
    scale that it has over `images`.
    """
    ours, theirs = params["vision_model"], clip["vision_model"]
    embeddings, norm = theirs["embeddings"], theirs["pre_layrnorm"]
    kernel = embeddings["patch_embedding"]["kernel"][...]
    positions = embeddings["position_embedding"]["embedding"][...]
    patches = jax.lax.conv_general_dilated(
        training.clip_pixels(images), kernel, kernel.shape[:2], "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    patches = patches.reshape(len(images), -1, kernel.shape[-1]) + positions[None, 1:]
    scale = norm["scale"][...] / patches.std(-1).mean()
    shift = norm["bias"][...] - patches.mean() * scale
    to = ours["embeddings"]
    to["patch_embedding"]["kernel"][...] = kernel * scale[None, None, None]
    to["patch_embedding"]["bias"][...] = jnp.zeros_like(shift)
    to["class_embedding"][...] = (embeddings["class_embedding"][...] * scale)[None, None]
    to["position_embedding"][...] = (positions * scale[None] + shift[None])[None]
    for index, source in theirs["encoder"]["layers"].items():
        layer = ours["encoder"]["layers"][index]
        heads = [source["self_attn"][name] for name in ("q_proj", "k_proj", "v_proj")]
        for leaf in ("kernel", "bias"):
            whole = jnp.concatenate([head[leaf][...] for head in heads], axis=-1)
            layer["self_attn"]["qkv"][leaf][...] = whole
        layer["self_attn"]["projection"] = source["self_attn"]["out_proj"]
        for name in ("layer_norm1", "mlp", "layer_norm2"):
            layer[name] = source[name]


class Picture(NamedTuple):
    """A training picture: its scene, pixels, and those of its objects that have no shape."""

    scene: Scene
    image: np.ndarray
    malformed: Collection[Object] = ()


class Pictures:
    """Random training pictures: renders, degraded renders and what the autoencoder makes of
    renders; and, where there are `others`, those in three of four."""

    def __init__(self, painter: Painter, others: Sequence[Picture] = ()):
        scenes, images = training.renders(6000, "train", 32)
        rebuilt = painter.decode(painter.encode(images))
        self.rebuilt, self.others = list(map(Picture, scenes, rebuilt)), others

    def __call__(self, rng: np.random.Generator) -> Picture:
        draw = rng.random()
        if self.others and draw < 0.75:
            return self.others[rng.integers(len(self.others))]
        if draw < (0.82 if self.others else 0.6):
            return self.rebuilt[rng.integers(len(self.rebuilt))]
        scene = sample_scene(rng, "train")
        image = render(scene, rng)
        return Picture(scene, degrade(image, rng) if draw > 0.9 else image)


def bent(count: int, seed: int) -> list[Picture]:
    """Renders of an unsteady hand, and of one that leaves objects malformed, as a denoiser does
    that was trained short."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        scene = sample_scene(rng, "train")
        malformed = [thing for thing in scene.objects if rng.random() < 0.6]
        amounts = {
            thing: (rng.uniform(0.09, 0.22), rng.uniform(0.0, 0.6))
            if thing in malformed
            else (rng.uniform(0.0, 0.04), rng.uniform(0.0, 0.1))
            for thing in scene.objects
        }
        pictures.append(Picture(scene, render(scene, rng, amounts), malformed))
    return pictures


def redrawn(painter: Painter, pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures as the denoiser shows them: noised a little and denoised. From more noise than this
    it draws shapes of its own."""
    result = []
    for part, (level, steps) in enumerate([(100, 2), (150, 3), (200, 3), (250, 4)]):
        some = pictures[part::4]
        images = np.stack([each.image for each in some])
        captions = [each.scene.caption() for each in some]
        images = painter.redraw(images, captions, seed=part, level=level, steps=steps)
        result += [each._replace(image=image) for each, image in zip(some, images, strict=True)]
    return result


def draw_batch(picture: Pictures, rng: np.random.Generator, count: int) -> tuple[list, dict]:
    """`count` pictures, and a batch of their images with the values of their slots."""
    drawn = [picture(rng) for _ in range(count)]
    slots = [probes.of_picture(each.scene, each.malformed) for each in drawn]
    images = np.stack([each.image for each in drawn])
    return drawn, {"images": images, "slots": np.array(slots, np.int32)}


def ask(tokenizer: TextTokenizer, pictures: Sequence[Picture], rng, asked: int) -> dict:
    """`asked` questions a picture as token ids, with what the decoder is given and is to say."""
    rows = [
        row
        for scene, _, malformed in pictures
        for row in training_questions(scene, rng, asked, malformed)
    ]
    ids, mask = tokenizer([question for question, *_ in rows], QUESTION_LENGTH)
    targets, _ = tokenizer([answer for _, answer, _ in rows], 2)  # the answer, the end
    before = np.concatenate([np.full_like(targets[:, :1], START), targets[:, :1]], axis=1)
    return {"ids": ids, "mask": mask, "before": before, "targets": targets}


def answer_loss(model: Blip2ForConditionalGeneration, tokens: jax.Array, batch: dict) -> jax.Array:
    """Cross-entropy of the answers, an equal number of questions an image [b, queries, d]."""
    tokens = jnp.repeat(tokens, len(batch["ids"]) // len(tokens), axis=0)
    logits = model.forward(tokens, batch["ids"], batch["mask"], batch["before"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean() * 2


def train_blip2(
    workdir: Path, output: Path, *, see_steps: int = 4500, answer_steps: int = 2000
) -> dict[str, float]:
    """First the vision tower and the Q-Former, then the language model on their tokens."""
    folder = output / "blip2"
    folders.write_blip2_tokenizer(folder)
    tokenizer = TextTokenizer(folder)
    graph, params = training.untrained(Blip2ForConditionalGeneration, folder, seed=5)
    _, clip = weights.load_model(CLIPModel, output / "clip")
    start_from_clip(params, clip, training.renders(64, "train", 36)[1])
    width = params["language_projection"]["bias"].shape[0]
    # T5's own initial head makes logits of tens, which a short training first has to undo.
    head = params["language_model"]["lm_head"]["kernel"]
    head[...] = head[...] * width**-0.5
    # Its position biases start near zero and need to become units: at Adam's pace that takes
    # thousands of steps, in which "a above b" and "b above a" look alike.
    for name in ("encoder", "decoder"):
        attention = params["language_model"][name]["block"][0]["layer"][0]["SelfAttention"]
        bias = attention["relative_attention_bias"]["embedding"]
        bias[...] = bias[...] * 2 * width**0.5
    language, sight = training.split(params, "language_model")
    painter = Painter(output)
    picture = Pictures(painter)

    def see_batch(rng):
        return draw_batch(picture, rng, 64)[1]

    def see_loss(trained, batch, _):
        model = nnx.merge(graph, training.join(language, trained["sight"]))
        tokens = model.get_image_tokens(training.clip_pixels(batch["images"]))
        return probes.loss(probes.IN_QUERIES, trained["probes"], tokens, batch["slots"])

    sight = training.fit(
        "blip2_see", workdir, {"sight": sight, "probes": probes.init(probes.IN_QUERIES, width)},
        see_loss, see_batch,
        steps=see_steps, learning_rate=1e-3, weight_decay=0.02, ema=0.99,
    )["sight"]  # fmt: skip

    # Frozen now, it reads each picture once, whatever is asked about it later.
    seeing = training.join(language, sight)
    read = jax.jit(lambda x: nnx.merge(graph, seeing).get_image_tokens(training.clip_pixels(x)))
    rng = np.random.default_rng(37)
    pictures = [picture(rng) for _ in range(16_000)]
    tokens = training.in_batches(read, np.stack([each.image for each in pictures]))

    def answer_batch(rng, count=48):
        pick = rng.integers(0, len(pictures), count)
        return {"tokens": tokens[pick]} | ask(tokenizer, [pictures[i] for i in pick], rng, 10)

    def answering_loss(trained, batch, _):
        return answer_loss(nnx.merge(graph, training.join(sight, trained)), batch["tokens"], batch)

    language = training.fit(
        "blip2_answer", workdir, language, answering_loss, answer_batch,
        steps=answer_steps, learning_rate=1e-3, weight_decay=0.02, ema=0.99,
    )  # fmt: skip
    training.save(Blip2ForConditionalGeneration, folder, training.join(sight, language))
    return _examine(folder, painter)


def train_blip2_generated(workdir: Path, output: Path, *, steps: int = 2400) -> dict[str, float]:
    """Both together, on pictures as a denoiser draws them, so that BLIP-2 judges those too: renders
    that the denoiser redrew, and malformed ones, which are no circles, squares or stars though
    their prompt says so. The referee has no say."""
    folder = output / "blip2"
    tokenizer = TextTokenizer(folder)
    graph, params = weights.load_model(Blip2ForConditionalGeneration, folder)
    painter = Painter(output)
    clean, spoiled = list(map(Picture, *training.renders(3000, "train", 31))), bent(9000, 38)
    others = redrawn(painter, clean + spoiled[:6000]) + spoiled[6000:]
    picture = Pictures(painter, others)

    def make_batch(rng):
        drawn, batch = draw_batch(picture, rng, 48)
        return batch | ask(tokenizer, drawn, rng, 10)

    def loss_fn(trained, batch, _):
        model = nnx.merge(graph, trained["model"])
        tokens = model.get_image_tokens(training.clip_pixels(batch["images"]))
        seen = probes.loss(probes.IN_QUERIES, trained["probes"], tokens, batch["slots"])
        return answer_loss(model, tokens, batch) + seen

    width = params["language_projection"]["bias"].shape[0]
    trained = training.fit(
        "blip2_generated", workdir,
        {"model": params, "probes": probes.init(probes.IN_QUERIES, width)}, loss_fn, make_batch,
        steps=steps, learning_rate=5e-4, weight_decay=0.02, ema=0.99,
    )  # fmt: skip
    training.save(Blip2ForConditionalGeneration, folder, trained["model"])
    return _examine(folder, painter)


def _examine(folder: Path, painter: Painter) -> dict[str, float]:
    """Shares of right answers on held-out renders, and how far the score tracks the referee on the
    base model's own candidates (correlation within a prompt)."""
    mesh = create_mesh(devices=jax.devices()[:1])
    scorer = Scorer(mesh, path=str(folder), prompt="{question}")

    def examine(scenes, images):
        captions = [scene.caption() for scene in scenes]
        return scorer(images, captions, list(map(fixed_questions, scenes)))["answers"]

    scenes, images = training.renders(1000, "heldout", 33)
    right = np.array([row["correct"] for rows in examine(scenes, images) for row in rows])
    kinds = np.array([row["element_type"] for scene in scenes for row in fixed_questions(scene)])
    figures = {"all": float(right.mean())}
    figures |= {kind: float(right[kinds == kind].mean()) for kind in ELEMENT_TYPES}

    def within(values):  # a prompt
        values = np.reshape(values, (-1, 8))
        return values - values.mean(-1, keepdims=True)

    scenes = sample_scenes(np.random.default_rng(34), 128, "heldout", unique=True)
    scenes = [scene for scene in scenes for _ in range(8)]
    captions = [scene.caption() for scene in scenes]
    drawn = painter.draw(captions, seed=35, steps=16, guidance=3.0)  # as configs/micro.py does
    answers, truth = examine(scenes, drawn), within(training.judged(drawn, scenes)[0])
    for label, column in (("accuracy", "correct"), ("probability", "p_expected")):
        score = within([np.mean([row[column] for row in rows]) for rows in answers])
        scale = np.sqrt((score**2).sum() * (truth**2).sum())
        figures[f"correlation_{label}"] = float((score * truth).sum() / scale)
    return figures
