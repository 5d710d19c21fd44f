"""Trains the micro suite from nothing: every weight that ships with the package, with fixed seeds.

    python -m agfsync_jax.micro.suite --workdir=DIR [--output=DIR] [STAGE ...]

Stages, each after what it needs: clip, vae, unet, aesthetic, blip2, blip2_generated. Without
names all of them run. A stage resumes from its last checkpoint, is skipped when it is done, and
ends with figures on captions that no stage trains on (figures.json in the output folder).
Everything is drawn from `micro/world.py`; its referee only measures, it never trains anything.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agfsync_jax.data.tokenizers import ClipTokenizer, TextTokenizer
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.samplers import ddim
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.micro import folders, world
from agfsync_jax.micro.training import (
    clip_pixels,
    fit,
    in_batches,
    pixels,
    renders,
    strict,
    uint8,
    unit,
)
from agfsync_jax.models.aesthetic import AestheticPredictor
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import CLIPModel, CLIPTextModel
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.utils import weights
from agfsync_jax.utils.memory import keep_freed_memory


# ----------------------------------------------------------------------------------------- clip
def train_clip(workdir: Path, output: Path, *, steps: int = 1500) -> dict[str, float]:
    """CLIP by its own loss (Radford et al. 2021); half of a batch are one-attribute changes of the
    other half, so that the towers must tell scenes apart and not only words."""
    folders.write_tokenizer(output / "clip")
    tokenize = ClipTokenizer(output / "clip")
    config = folders.clip_config(tokenize)
    graph, params = weights.init_model(CLIPModel, CLIPModel.config_class.from_dict(config), seed=1)

    def make_batch(rng, half=48, split="train", changed="train"):
        scenes = [world.sample_scene(rng, split) for _ in range(half)]
        scenes += [world.mutate(scene, rng, changed) for scene in scenes]
        images = np.stack([world.render(scene, rng) for scene in scenes])
        return {"images": images, "ids": tokenize([scene.caption() for scene in scenes])}

    def loss_fn(params, batch, _):
        model = nnx.merge(graph, params)
        image = unit(model.get_image_features(clip_pixels(batch["images"])))
        text = unit(model.get_text_features(batch["ids"]))
        logits = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0))) * image @ text.T
        # Equal captions are equally right.
        same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).astype(jnp.float32)
        same = same / same.sum(-1, keepdims=True)
        rows = optax.softmax_cross_entropy(logits, same).mean()
        return (rows + optax.softmax_cross_entropy(logits.T, same).mean()) / 2

    params = fit(
        "clip", workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=1e-3, weight_decay=0.05, ema=0.995,
    )  # fmt: skip
    weights.save_model(CLIPModel, output / "clip", params, config, dtype=np.float16)
    folders.write_text_encoder(output / "stable-diffusion", params, config)

    @jax.jit
    def embed(images, ids):
        model = nnx.merge(graph, params)
        image = unit(model.get_image_features(clip_pixels(images)))
        return jnp.concatenate([image, unit(model.get_text_features(ids))], axis=-1)

    rng = np.random.default_rng(99)
    right = []
    for _ in range(10):  # retrieval among 100 different captions, ten times
        scenes = world.sample_scenes(rng, 100, "heldout", unique=True)
        images = np.stack([world.render(scene, rng) for scene in scenes])
        both = in_batches(embed, images, tokenize([scene.caption() for scene in scenes]), size=100)
        image, text = np.split(both, 2, axis=-1)
        right.append((np.argmax(image @ text.T, -1) == np.arange(100)).mean())
    pairs = make_batch(rng, 500, "heldout", "all")
    both = in_batches(embed, pairs["images"], pairs["ids"], size=100)
    image, text = np.split(both, 2, axis=-1)
    own = (image * text).sum(-1)
    other = (image * np.roll(text, 500, axis=0)).sum(-1)
    return {
        "retrieval_of_100": float(np.mean(right)),
        "own_above_changed": float((own > other).mean()),
    }


# ------------------------------------------------------------------------------------------ vae
def train_vae(workdir: Path, output: Path, *, steps: int = 1600) -> dict[str, float]:
    """The autoencoder: L1 + 2 MSE + 1e-3 KL (both means), on renders."""
    config = folders.VAE
    graph, params = weights.init_model(
        AutoencoderKL, AutoencoderKL.config_class.from_dict(config), seed=2
    )

    def make_batch(rng, count=16):
        scenes = [world.sample_scene(rng, "train") for _ in range(count)]
        return {"images": np.stack([world.render(scene, rng) for scene in scenes])}

    def loss_fn(params, batch, key):
        model = nnx.merge(graph, params)
        images = pixels(batch["images"])
        mean, log_variance = model.encode(images)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = model.decode(latents) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        return jnp.abs(error).mean() + 2 * jnp.square(error).mean() + 1e-3 * kl

    params = fit(
        "vae", workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=2e-3, ema=0.995,
    )  # fmt: skip

    @jax.jit
    def encode(images):
        return nnx.merge(graph, params).encode(pixels(images))[0]

    @jax.jit
    def decode(latents):
        return uint8(nnx.merge(graph, params).decode(latents))

    _, images = renders(2048, "train", 5)
    factor = float(1 / in_batches(encode, images).std())
    folder = output / "stable-diffusion" / "vae"
    config = config | {"scaling_factor": round(factor, 5)}
    weights.save_model(AutoencoderKL, folder, params, config, dtype=np.float16)
    scenes, images = renders(1000, "heldout", 6)
    rebuilt = in_batches(decode, in_batches(encode, images))
    mse = np.square(rebuilt.astype(np.float32) - images).mean()
    return {
        "referee_strict": strict(rebuilt, scenes),
        "psnr": float(10 * np.log10(255**2 / mse)),
        "scaling_factor": factor,
    }


# ----------------------------------------------------------------------------------------- unet
class Painter:
    """The suite's own Stable Diffusion, as far as it is trained."""

    def __init__(self, output: Path, unet: tuple[Any, nnx.State] | None = None):
        folder = output / "stable-diffusion"
        self.tokenize = ClipTokenizer(folder / "tokenizer")
        self.schedule = Schedule.from_config(folders.SCHEDULER)
        text_graph, text = weights.load_model(CLIPTextModel, folder / "text_encoder")
        vae_graph, vae = weights.load_model(AutoencoderKL, folder / "vae")
        factor = weights.read_json(folder / "vae" / "config.json")["scaling_factor"]
        self.encode_text = jax.jit(lambda ids: nnx.merge(text_graph, text)(ids)[0])
        self.encode = jax.jit(lambda x: nnx.merge(vae_graph, vae).encode(pixels(x))[0] * factor)
        self.decode = jax.jit(lambda z: uint8(nnx.merge(vae_graph, vae).decode(z / factor)))
        self.blank = self.encode_text(self.tokenize([""]))  # [1, n, d]
        if unet is None and (folder / "unet" / "config.json").exists():
            unet = weights.load_model(UNet2DConditionModel, folder / "unet")
        self.unet = unet

    def embed(self, captions: list[str]) -> np.ndarray:
        """Hidden states [b, n, d] of captions."""
        return in_batches(self.encode_text, self.tokenize(captions))

    def guided(self, params: nnx.State, context: jax.Array, guidance_scale: float):
        """The guided denoiser of a batch of contexts."""
        graph = self.unet[0]
        blank = jnp.broadcast_to(self.blank, context.shape)
        return guide(
            lambda x, t, c: nnx.merge(graph, params)(x, t, c), context, blank, guidance_scale
        )

    def draw(self, captions: list[str], seed: int, *, steps: int = 20, guidance: float = 5.0):
        """Pictures uint8 [b, 64, 64, 3] of captions."""

        @jax.jit
        def sample(params, latents, context):
            return ddim(self.guided(params, context, guidance), self.schedule, latents, steps)

        shape = (len(captions), *folders.LATENT_SHAPE)
        noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        latents = in_batches(
            lambda *batch: sample(self.unet[1], *batch), noise, self.embed(captions)
        )
        return in_batches(self.decode, latents)

    def redraw(self, images: np.ndarray, captions: list[str], seed: int, *, level: int, steps: int):
        """Noises pictures to timestep `level` and denoises them in `steps` steps."""
        alphas = jnp.asarray(self.schedule.alphas_cumprod)
        times = np.linspace(level, 0, steps + 1).round().astype(np.int32)

        @jax.jit
        def run(params, latents, noise, context):
            denoise = self.guided(params, context, 3.0)
            a = alphas[times[0]]
            noisy = jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise

            def step(x, pair):
                now, after = alphas[pair[0]], alphas[pair[1]]
                epsilon = denoise(x, jnp.full(x.shape[:1], pair[0]))
                clean = (x - jnp.sqrt(1 - now) * epsilon) / jnp.sqrt(now)
                return jnp.sqrt(after) * clean + jnp.sqrt(1 - after) * epsilon, None

            return jax.lax.scan(step, noisy, np.stack([times[:-1], times[1:]], 1))[0]

        latents = in_batches(self.encode, images)
        noise = np.random.default_rng(seed).standard_normal(latents.shape).astype(np.float32)
        latents = in_batches(
            lambda *batch: run(self.unet[1], *batch), latents, noise, self.embed(captions)
        )
        return in_batches(self.decode, latents)


def train_unet(workdir: Path, output: Path, *, steps: int = 2600) -> dict[str, float]:
    """The denoiser: epsilon prediction with min-SNR-5 weights (Hang et al. 2023), 10% of captions
    left out for guidance. Trained short on purpose: the loop is to have something to mend."""
    painter = Painter(output)
    config = UNet2DConditionModel.config_class.from_dict(folders.UNET)
    graph, params = weights.init_model(UNet2DConditionModel, config, seed=3)
    scenes, images = renders(24_000, "train", 7)
    latents = in_batches(painter.encode, images)
    del images
    # Distinct captions are few: their hidden states are computed once.
    captions = sorted({scene.caption() for scene in scenes})
    index = {caption: number for number, caption in enumerate(captions)}
    context = np.concatenate([painter.embed(captions), np.asarray(painter.blank)])
    rows = np.array([index[scene.caption()] for scene in scenes])
    alphas = jnp.asarray(painter.schedule.alphas_cumprod)

    def make_batch(rng, count=64):
        pick = rng.integers(0, len(latents), count)
        text = np.where(rng.random(count) < 0.1, len(captions), rows[pick])
        return {"latents": latents[pick], "context": context[text]}

    def loss_fn(params, batch, key):
        time_key, noise_key = jax.random.split(key)
        clean = batch["latents"]
        times = jax.random.randint(time_key, clean.shape[:1], 0, len(alphas))
        noise = jax.random.normal(noise_key, clean.shape)
        noisy = painter.schedule.add_noise(clean, noise, times)
        error = nnx.merge(graph, params)(noisy, times, batch["context"]) - noise
        snr = alphas[times] / (1 - alphas[times])
        return (jnp.square(error).mean((1, 2, 3)) * jnp.minimum(snr, 5.0) / snr).mean()

    params = fit(
        "unet", workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=1e-3, ema=0.995,
    )  # fmt: skip
    weights.save_model(
        UNet2DConditionModel, output / "stable-diffusion" / "unet", params, folders.UNET,
        dtype=np.float16,
    )  # fmt: skip
    folders.write_pipeline(output / "stable-diffusion")
    painter.unet = (graph, params)
    scenes = world.sample_scenes(np.random.default_rng(8), 400, "heldout", unique=True)
    drawn = painter.draw([scene.caption() for scene in scenes], seed=9)
    checks = [world.referee(*pair) for pair in zip(drawn, scenes, strict=True)]
    return {
        "referee": float(np.mean([world.referee_mean(each) for each in checks])),
        "referee_strict": float(np.mean([world.referee_strict(each) for each in checks])),
    }


# ------------------------------------------------------------------------------------ aesthetic
def train_aesthetic(workdir: Path, output: Path, *, steps: int = 1500) -> dict[str, float]:
    """The LAION predictor's form on CLIP's image embedding: near 7 for a clean render, near 3 for
    one spoiled by noise, blur, washed-out color or an autoencoder with noisy latents."""
    clip_graph, clip = weights.load_model(CLIPModel, output / "clip")
    painter = Painter(output)
    embed = jax.jit(lambda x: unit(nnx.merge(clip_graph, clip).get_image_features(clip_pixels(x))))

    def pairs(count: int, split: str, seed: int):
        _, clean = renders(count, split, seed)
        rng = np.random.default_rng(seed)
        spoiled = np.stack([world.degrade(image, rng) for image in clean])
        rough = in_batches(painter.encode, clean[::4])
        rough = rough + 0.35 * rng.standard_normal(rough.shape, np.float32)
        spoiled[::4] = in_batches(painter.decode, rough)
        return in_batches(embed, clean), in_batches(embed, spoiled)

    clean, spoiled = pairs(8000, "train", 21)
    config = {"input_size": clean.shape[-1]}
    graph, params = weights.init_model(
        AestheticPredictor, AestheticPredictor.config_class.from_dict(config), seed=4
    )

    def make_batch(rng, count=128):
        pick = rng.integers(0, len(clean), count)
        return {"clean": clean[pick], "spoiled": spoiled[pick]}

    def loss_fn(params, batch, _):
        score = nnx.merge(graph, params)
        high, low = score(batch["clean"]), score(batch["spoiled"])
        ordered = -jax.nn.log_sigmoid(high - low).mean()
        return ordered + 0.05 * (jnp.square(high - 7.0) + jnp.square(low - 3.0)).mean()

    params = fit(
        "aesthetic", workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=1e-3, weight_decay=0.05, ema=0.99,
    )  # fmt: skip
    weights.save_params(output / "aesthetic.safetensors", params, dtype=np.float16)
    high, low = (nnx.merge(graph, params)(each) for each in pairs(1000, "heldout", 22))
    return {"clean_above_degraded": float((high > low).mean())}


# ---------------------------------------------------------------------------------------- blip2
def train_blip2(workdir: Path, output: Path, *, steps: int = 2600) -> dict[str, float]:
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
        images, texts, answers = [], [], []
        for _ in range(count):
            scene, image = picture(rng)
            images.append(image)
            for question, answer, _ in world.training_questions(scene, rng, asked):
                texts.append(question)
                answers.append(answer)
        ids, mask = tokenizer(texts, folders.QUESTION_LENGTH)
        targets, _ = tokenizer(answers, 2)  # the answer, the end
        before = np.concatenate([np.full_like(targets[:, :1], start), targets[:, :1]], axis=1)
        images = np.stack(images)
        return {"images": images, "ids": ids, "mask": mask, "before": before, "targets": targets}

    def loss_fn(params, batch, _):
        model = nnx.merge(graph, params)
        tokens = model.get_image_tokens(clip_pixels(batch["images"]))
        tokens = jnp.repeat(tokens, len(batch["ids"]) // len(tokens), axis=0)
        logits = model.forward(tokens, batch["ids"], batch["mask"], batch["before"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean() * 2

    params = fit(
        name, workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=learning_rate, weight_decay=0.02, ema=0.995,
    )  # fmt: skip
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


STAGES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "clip": train_clip,
    "vae": train_vae,
    "unet": train_unet,
    "aesthetic": train_aesthetic,
    "blip2": train_blip2,
    "blip2_generated": train_blip2_generated,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the stages named on the command line, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints of the training")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    for name in options.stages or STAGES:
        if name not in STAGES:
            parser.error(f"there is no stage {name!r}; there are: {', '.join(STAGES)}")
        figures_path = options.output / "figures.json"
        figures = json.loads(figures_path.read_text()) if figures_path.exists() else {}
        if name in figures:
            print(f"{name}: done before: {figures[name]}", flush=True)
            continue
        result = STAGES[name](options.workdir, options.output)
        figures = json.loads(figures_path.read_text()) if figures_path.exists() else {}
        figures[name] = {key: round(value, 4) for key, value in result.items()}
        folders.write_json(figures_path, figures)
        print(f"{name}: {figures[name]}", flush=True)


if __name__ == "__main__":
    main()
