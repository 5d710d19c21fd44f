"""Trains the micro BLIP-2: sight from CLIP, then what to look for, then how to answer.

As in the paper (Li et al. 2023) the vision tower starts from CLIP's, and the Q-Former learns what
of an image to pass on. Here that is a linear probe for each of the first queries (`SLOTS`): it
reads one fact of the scene from its query's token and is thrown away after training. Without it
all queries come out alike, and questions of shape and place stay near chance.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agfsync_jax.data.tokenizers import TextTokenizer
from agfsync_jax.micro import folders, world
from agfsync_jax.micro.painter import Painter
from agfsync_jax.micro.training import clip_pixels, fit, in_batches, renders
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.utils import weights

_COLORS, _SHAPES, _BACKGROUNDS = list(world.COLORS), list(world.SHAPES), list(world.BACKGROUNDS)
_LAYOUTS = ["small", "large", "vertical", "horizontal", "group"]
# A fact of the scene -> how many values it has. A pair's first object is the upper or the left.
SLOTS = {
    "background": len(_BACKGROUNDS),
    "count": 4,
    "first color": len(_COLORS),
    "first shape": len(_SHAPES),
    "second color": len(_COLORS) + 1,  # or none
    "second shape": len(_SHAPES) + 1,
    "layout": len(_LAYOUTS),
}


def facts(scene: world.Scene) -> list[int]:
    """The value of each slot."""
    things = list(scene.objects)
    if scene.relation in ("below", "to the right of"):
        things.reverse()
    if scene.kind == "pair":
        layout = "vertical" if scene.relation in ("above", "below") else "horizontal"
    else:
        layout = scene.size or "group"
    second = things[1] if scene.kind == "pair" else None
    return [
        _BACKGROUNDS.index(scene.background),
        scene.count - 1,
        _COLORS.index(things[0].color),
        _SHAPES.index(things[0].shape),
        _COLORS.index(second.color) if second else len(_COLORS),
        _SHAPES.index(second.shape) if second else len(_SHAPES),
        _LAYOUTS.index(layout),
    ]


def probe_loss(probes: dict, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of the slots, read from tokens [b, queries, d]; targets [b, slots]."""
    losses = []
    for index, name in enumerate(SLOTS):
        logits = tokens[:, index] @ probes[name]["kernel"] + probes[name]["bias"][None]
        losses.append(
            optax.softmax_cross_entropy_with_integer_labels(logits, targets[:, index]).mean()
        )
    return jnp.stack(losses).mean()


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
        clip_pixels(images), kernel, kernel.shape[:2], "VALID",
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
    for index in range(len(theirs["encoder"]["layers"])):
        layer, source = ours["encoder"]["layers"][index], theirs["encoder"]["layers"][index]
        heads = [source["self_attn"][name] for name in ("q_proj", "k_proj", "v_proj")]
        for leaf in ("kernel", "bias"):
            whole = jnp.concatenate([head[leaf][...] for head in heads], axis=-1)
            layer["self_attn"]["qkv"][leaf][...] = whole
            layer["self_attn"]["projection"][leaf][...] = source["self_attn"]["out_proj"][leaf][...]
            for name in ("fc1", "fc2"):
                layer["mlp"][name][leaf][...] = source["mlp"][name][leaf][...]
        for name in ("layer_norm1", "layer_norm2"):
            for leaf in ("scale", "bias"):
                layer[name][leaf][...] = source[name][leaf][...]


def train_blip2(workdir: Path, output: Path, *, steps: int = 2000) -> dict[str, float]:
    """BLIP-2 on renders, degraded renders and what the autoencoder makes of renders."""
    return _train_blip2("blip2", workdir, output, steps=steps, learning_rate=1e-3)


def train_blip2_generated(workdir: Path, output: Path, *, steps: int = 800) -> dict[str, float]:
    """Goes on with pictures that the denoiser redrew from noised renders, so that BLIP-2 judges
    generated pictures too. They keep the answers of the render: nothing here asks the referee."""
    painter = Painter(output)
    scenes, images = renders(4000, "train", 31)
    captions = [scene.caption() for scene in scenes]
    drawn = [
        painter.redraw(images[part::4], captions[part::4], seed=part, level=level, steps=count)
        for part, (level, count) in enumerate([(250, 4), (400, 6), (500, 8), (600, 10)])
    ]
    pool = [
        (scene, image)
        for part in range(4)
        for scene, image in zip(scenes[part::4], drawn[part], strict=True)
    ]
    return _train_blip2(
        "blip2_generated", workdir, output, steps=steps, learning_rate=4e-4, generated=pool
    )


def _train_blip2(name, workdir, output, *, steps, learning_rate, generated=()) -> dict[str, float]:
    folder = output / "blip2"
    folders.write_blip2_tokenizer(folder)
    tokenizer = TextTokenizer(folder)
    config = folders.blip2_config(tokenizer)
    if generated:
        graph, params = weights.load_model(Blip2ForConditionalGeneration, folder)
    else:
        graph, params = weights.init_model(
            Blip2ForConditionalGeneration,
            Blip2ForConditionalGeneration.config_class.from_dict(config),
            seed=5,
        )
        _, clip = weights.load_model(CLIPModel, output / "clip")
        start_from_clip(params, clip, renders(64, "train", 36)[1])
        # T5's own initial head makes logits of tens, which a short training first has to undo.
        head = params["language_model"]["lm_head"]["kernel"]
        head[...] = head[...] * config["text_config"]["d_model"] ** -0.5
    painter = Painter(output)
    scenes, images = renders(6000, "train", 32)
    rebuilt = in_batches(painter.decode, in_batches(painter.encode, images))
    pool = list(zip(scenes, rebuilt, strict=True))
    start = config["text_config"]["decoder_start_token_id"]

    def picture(rng) -> tuple[world.Scene, np.ndarray]:
        draw = rng.random()
        if generated and draw < 0.5:
            return generated[rng.integers(len(generated))]
        if draw < 0.7:
            return pool[rng.integers(len(pool))]
        scene = world.sample_scene(rng, "train")
        image = world.render(scene, rng)
        return scene, (world.degrade(image, rng) if draw > 0.85 else image)

    def make_batch(rng, count=48, asked=10):
        images, slots, texts, answers = [], [], [], []
        for _ in range(count):
            scene, image = picture(rng)
            images.append(image)
            slots.append(facts(scene))
            for question, answer, _ in world.training_questions(scene, rng, asked):
                texts.append(question)
                answers.append(answer)
        ids, mask = tokenizer(texts, folders.QUESTION_LENGTH)
        targets, _ = tokenizer(answers, 2)  # the answer, the end
        before = np.concatenate([np.full_like(targets[:, :1], start), targets[:, :1]], axis=1)
        return {
            "images": np.stack(images),
            "slots": np.array(slots, np.int32),
            "ids": ids,
            "mask": mask,
            "before": before,
            "targets": targets,
        }

    def loss_fn(trained, batch, _):
        model = nnx.merge(graph, trained["model"])
        tokens = model.get_image_tokens(clip_pixels(batch["images"]))
        seen = probe_loss(trained["probes"], tokens, batch["slots"])
        tokens = jnp.repeat(tokens, len(batch["ids"]) // len(tokens), axis=0)
        logits = model.forward(tokens, batch["ids"], batch["mask"], batch["before"])
        answered = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return 2 * answered.mean() + seen

    width = config["text_config"]["d_model"]
    probes = {
        slot: {"kernel": jnp.zeros((width, values)), "bias": jnp.zeros(values)}
        for slot, values in SLOTS.items()
    }
    trained = fit(
        name, workdir, {"model": params, "probes": probes}, loss_fn, make_batch,
        steps=steps, learning_rate=learning_rate, weight_decay=0.02, ema=0.995,
    )  # fmt: skip
    params = trained["model"]
    weights.save_model(Blip2ForConditionalGeneration, folder, params, config, dtype=np.float16)
    return _examine(graph, params, tokenizer, painter, start)


def _examine(graph, params, tokenizer, painter, start) -> dict[str, float]:
    """Shares of right answers on held-out renders, and how far the score tracks the referee on the
    base model's own candidates (correlation within a prompt)."""
    read = jax.jit(lambda x: nnx.merge(graph, params).get_image_tokens(clip_pixels(x)))

    @jax.jit
    def answer(tokens, ids, mask):
        before = jnp.full((len(ids), 1), start, jnp.int32)
        return nnx.merge(graph, params).forward(tokens, ids, mask, before)[:, 0]

    def ask(scenes, images):
        """Rows (image, element type, right, probability of the right answer)."""
        rows = [(i, row) for i, scene in enumerate(scenes) for row in world.questions(scene)]
        ids, mask = tokenizer([row["question"] for _, row in rows], folders.QUESTION_LENGTH)
        tokens = in_batches(read, images)[[i for i, _ in rows]]
        logits = in_batches(answer, tokens, ids, mask, size=512)
        for (i, row), scores in zip(rows, logits, strict=True):
            choices = [tokenizer.encode(choice, special=False)[0] for choice in row["choices"]]
            odds = np.exp(scores[choices] - scores[choices].max())
            right = row["choices"].index(row["answer"])
            yield i, row["element_type"], odds.argmax() == right, odds[right] / odds.sum()

    scenes, images = renders(1000, "heldout", 33)
    answers = list(ask(scenes, images))
    figures = {"all": float(np.mean([right for _, _, right, _ in answers]))}
    for kind in world.ELEMENT_TYPES:
        figures[kind] = float(np.mean([right for _, each, right, _ in answers if each == kind]))
    if painter.unet is not None:
        scenes = world.sample_scenes(np.random.default_rng(34), 64, "heldout", unique=True)
        scenes = [scene for scene in scenes for _ in range(8)]
        drawn = painter.draw([scene.caption() for scene in scenes], seed=35)
        judged = [
            world.referee_mean(world.referee(*pair)) for pair in zip(drawn, scenes, strict=True)
        ]
        answers = list(ask(scenes, drawn))
        owner = np.array([i for i, *_ in answers])
        for label, column in (("accuracy", 2), ("probability", 3)):
            values = np.array([row[column] for row in answers], np.float64)
            score = np.bincount(owner, values) / np.bincount(owner)
            figures[f"correlation_{label}"] = _correlation_within(score, np.array(judged), 8)
    return figures


def _correlation_within(first: np.ndarray, second: np.ndarray, group: int) -> float:
    first, second = (each.reshape(-1, group) for each in (first, second))
    first, second = (each - each.mean(-1, keepdims=True) for each in (first, second))
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))
