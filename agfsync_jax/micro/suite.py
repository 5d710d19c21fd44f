"""Trains the micro suite from nothing: every weight that ships with the package, with fixed seeds.

    python -m agfsync_jax.micro.suite --workdir=DIR [--output=DIR] [STAGE ...]

Stages, each after what it needs: clip, vae, unet, blip2, blip2_generated, aesthetic. Without
names all of them run. A stage resumes from its last checkpoint, is skipped when it is done, and
ends with figures on captions that no stage trains on (figures.json in the output folder). The
networks have the sizes in that folder's config.json files, which are the shipped ones at first.
Everything is drawn from the micro world (micro/grammar.py); its referee only measures, it never
trains anything.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.micro import folders, probes, training
from agfsync_jax.micro.answering import train_blip2, train_blip2_generated
from agfsync_jax.micro.drawing import degrade, render
from agfsync_jax.micro.grammar import Scene
from agfsync_jax.micro.painter import Painter
from agfsync_jax.micro.scenes import misread, mutate, sample_scene, sample_scenes
from agfsync_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from agfsync_jax.models.clip import CLIPModel, CLIPTextModel
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.weights import networks as weights
from agfsync_jax.weights.tensor_files import write_tensors

CARELESS_CAPTIONS = 0.5  # of those in the last steps of the UNet


def train_clip(
    workdir: Path, output: Path, *, text_steps: int = 800, steps: int = 1500
) -> dict[str, float]:
    """CLIP, its text tower first: probes make it tell who is where, which CLIP's loss alone leaves
    faint, and a denoiser that reads it would draw at a coin's throw. Then, with the text tower
    locked (Zhai et al. 2022, of the vision tower), the rest by CLIP's own loss (Radford et al.
    2021); half of a batch are one-attribute changes of the other half, so that the towers must
    tell scenes apart and not only words."""
    folders.write_clip_tokenizer(output)
    tokenize = ClipTokenizer(output / "clip")
    graph, params = training.untrained(CLIPModel, output / "clip", seed=1)
    text, rest = training.split(params, "text_model")

    def caption_batch(rng, count=128):
        scenes = sample_scenes(rng, count, "train")
        slots = [probes.of_caption(scene) for scene in scenes]
        ids = tokenize([scene.caption() for scene in scenes])
        return {"ids": ids, "slots": np.array(slots, np.int32)}

    def caption_loss(trained, batch, _):
        model = nnx.merge(graph, training.join(rest, trained["text"]))
        seen = model.text_model(batch["ids"])
        tokens = jnp.concatenate([seen.last_hidden_state, seen.pooler_output[:, None]], axis=1)
        return probes.loss(probes.IN_CAPTION, trained["probes"], tokens, batch["slots"])

    width = params["text_projection"]["kernel"].shape[0]
    text = training.fit(
        "clip_text", workdir, {"text": text, "probes": probes.init(probes.IN_CAPTION, width)},
        caption_loss, caption_batch,
        steps=text_steps, learning_rate=1e-3, weight_decay=0.05, ema=0.99,
    )["text"]  # fmt: skip
    config = weights.read_json(output / "clip" / "config.json")["text_config"]
    folder = output / "stable-diffusion" / "text_encoder"
    training.save(CLIPTextModel, folder, training.join(text), **config)

    def make_batch(rng, half=48):
        scenes = sample_scenes(rng, half, "train")
        scenes += [mutate(scene, rng, "train") for scene in scenes]
        images = np.stack([render(scene, rng) for scene in scenes])
        return {"images": images, "ids": tokenize([scene.caption() for scene in scenes])}

    def loss_fn(rest, batch, _):
        return contrastive_loss(nnx.merge(graph, training.join(text, rest)), batch)[0]

    rest = training.fit(
        "clip", workdir, rest, loss_fn, make_batch,
        steps=steps, learning_rate=1e-3, weight_decay=0.05, ema=0.995,
    )  # fmt: skip
    params = training.join(text, rest)
    training.save(CLIPModel, output / "clip", params)
    return retrieval(graph, params, tokenize)


def contrastive_loss(model: CLIPModel, batch: dict) -> tuple[jax.Array, jax.Array]:
    """CLIP's symmetric loss over images and ids, and the image embeddings, of length 1.

    Equal captions are equally right.
    """
    image = training.unit(model.get_image_features(training.clip_pixels(batch["images"])))
    text = training.unit(model.get_text_features(batch["ids"]))
    logits = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0))) * image @ text.T
    same = (batch["ids"][:, None] == batch["ids"][None]).all(-1).astype(jnp.float32)
    same = same / same.sum(-1, keepdims=True)
    rows = optax.softmax_cross_entropy(logits, same).mean()
    return (rows + optax.softmax_cross_entropy(logits.T, same).mean()) / 2, image


def retrieval(graph, params, tokenize) -> dict[str, float]:
    """How often an image finds its caption among 100 different ones, and above a changed one."""

    @jax.jit
    def embed(images, ids):
        model = nnx.merge(graph, params)
        image = training.unit(model.get_image_features(training.clip_pixels(images)))
        return jnp.concatenate([image, training.unit(model.get_text_features(ids))], axis=-1)

    def both(scenes, images):
        ids = tokenize([scene.caption() for scene in scenes])
        return np.split(training.in_batches(embed, images, ids, size=100), 2, axis=-1)

    rng = np.random.default_rng(99)
    right, above = [], []
    for _ in range(10):
        scenes = sample_scenes(rng, 100, "heldout", unique=True)
        images = np.stack([render(scene, rng) for scene in scenes])
        image, text = both(scenes, images)
        right.append((np.argmax(image @ text.T, -1) == np.arange(100)).mean())
        _, changed = both([mutate(scene, rng) for scene in scenes], images)
        above.append(((image * text).sum(-1) > (image * changed).sum(-1)).mean())
    return {"retrieval_of_100": float(np.mean(right)), "own_above_changed": float(np.mean(above))}


def train_vae(workdir: Path, output: Path, *, steps: int = 1600) -> dict[str, float]:
    """The autoencoder: L1 + 2 MSE + 1e-3 KL (both means), on renders."""
    folder = output / "stable-diffusion" / "vae"
    graph, params = training.untrained(AutoencoderKL, folder, seed=2)

    def make_batch(rng, count=16):
        return {"images": training.renders(count, "train", rng)[1]}

    def loss_fn(params, batch, key):
        model = nnx.merge(graph, params)
        images = batch["images"].astype(jnp.float32) / 127.5 - 1.0
        mean, log_variance = model.encode(images)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = model.decode(latents) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        return jnp.abs(error).mean() + 2 * jnp.square(error).mean() + 1e-3 * kl

    params = training.fit(
        "vae", workdir, params, loss_fn, make_batch,
        steps=steps, learning_rate=2e-3, ema=0.995,
    )  # fmt: skip

    @jax.jit
    def encode(images):
        return nnx.merge(graph, params).encode(images.astype(jnp.float32) / 127.5 - 1.0)[0]

    @jax.jit
    def decode(latents):
        images = nnx.merge(graph, params).decode(latents)
        return jnp.round(jnp.clip(images * 0.5 + 0.5, 0.0, 1.0) * 255).astype(jnp.uint8)

    _, images = training.renders(2048, "train", 5)
    factor = float(1 / training.in_batches(encode, images).std())
    training.save(AutoencoderKL, folder, params, scaling_factor=round(factor, 5))
    scenes, images = training.renders(1000, "heldout", 6)
    rebuilt = training.in_batches(decode, training.in_batches(encode, images))
    mse = np.square(rebuilt.astype(np.float32) - images).mean()
    return {
        "referee_strict": float(training.judged(rebuilt, scenes)[1].mean()),
        "psnr": float(10 * np.log10(255**2 / mse)),
        "scaling_factor": factor,
    }


def train_unet(
    workdir: Path, output: Path, *, steps: int = 3000, careless_steps: int = 500
) -> dict[str, float]:
    """The denoiser: epsilon prediction with min-SNR-5 weights (Hang et al. 2023), 10% of captions
    left out for guidance.

    The last steps are on captions of which half are careless, as captions from the web are: what
    it draws is crisp, and now and then not what was asked. The loop is to have something to mend
    that its scorers can see.
    """
    folder = output / "stable-diffusion" / "unet"
    graph, params = training.untrained(UNet2DConditionModel, folder, seed=3)
    training.save(UNet2DConditionModel, folder, params)  # makes the pipeline whole, to be opened
    painter = Painter(output)
    scenes, images = training.renders(24_000, "train", 7)
    latents = painter.encode(images)
    del images
    rng = np.random.default_rng(10)
    careless = [
        misread(scene, rng, "train") if rng.random() < CARELESS_CAPTIONS else scene
        for scene in scenes
    ]
    # Distinct captions are few: their hidden states are computed once.
    captions = sorted({scene.caption() for scene in scenes + careless})
    index = {caption: number for number, caption in enumerate(captions)}
    context = np.concatenate([painter.embed(captions), painter.blank])
    schedule = painter.backbone.schedule
    alphas = jnp.asarray(schedule.alphas_cumprod)

    def batches(told: list[Scene]):
        rows = np.array([index[scene.caption()] for scene in told])

        def make_batch(rng, count=64):
            pick = rng.integers(0, len(latents), count)
            text = np.where(rng.random(count) < 0.1, len(captions), rows[pick])
            return {"latents": latents[pick], "context": context[text]}

        return make_batch

    def loss_fn(params, batch, key):
        time_key, noise_key = jax.random.split(key)
        clean = batch["latents"]
        times = jax.random.randint(time_key, clean.shape[:1], 0, len(alphas))
        noise = jax.random.normal(noise_key, clean.shape)
        noisy = schedule.add_noise(clean, noise, times)
        error = nnx.merge(graph, params)(noisy, times, batch["context"]) - noise
        snr = alphas[times] / (1 - alphas[times])
        return (jnp.square(error).mean((1, 2, 3)) * jnp.minimum(snr, 5.0) / snr).mean()

    params = training.fit(
        "unet", workdir, params, loss_fn, batches(scenes),
        steps=steps, learning_rate=1e-3, ema=0.995,
    )  # fmt: skip
    params = training.fit(
        "unet_careless", workdir, params, loss_fn, batches(careless),
        steps=careless_steps, learning_rate=5e-4, ema=0.99,
    )  # fmt: skip
    training.save(UNet2DConditionModel, folder, params)
    painter.params["unet"] = params
    scenes = sample_scenes(np.random.default_rng(8), 400, "heldout", unique=True)
    drawn = painter.draw([scene.caption() for scene in scenes], seed=9)
    share, strict = training.judged(drawn, scenes)
    return {"referee": float(share.mean()), "referee_strict": float(strict.mean())}


def train_aesthetic(workdir: Path, output: Path, *, steps: int = 500) -> dict[str, float]:
    """The LAION predictor's form on CLIP's image embedding: near 7 for a clean render, near 3 for
    one spoiled by noise, blur, washed-out color or an autoencoder with noisy latents.

    CLIP has seen clean renders only, and its embedding says little of their quality: its vision
    tower goes on training with the head, by CLIP's loss too. The text tower, which is Stable
    Diffusion's, stays as it is.
    """
    tokenize = ClipTokenizer(output / "clip")
    graph, clip = weights.load_model(CLIPModel, output / "clip")
    text, vision = training.split(clip, "text_model", "text_projection")
    sizes = AestheticConfig(input_size=clip["visual_projection"]["kernel"].shape[-1])
    head_graph, head = weights.init_model(AestheticPredictor, sizes, seed=4)
    painter = Painter(output)

    def rough(images: np.ndarray, seed: int) -> np.ndarray:
        latents = painter.encode(images)
        noise = np.random.default_rng(seed).standard_normal(latents.shape).astype(np.float32)
        return painter.decode(latents + 0.35 * noise)

    scenes, images = training.renders(2000, "train", 21)
    pool = list(zip(scenes, images, rough(images, 22), strict=True))

    def draw(rng):
        if rng.random() < 0.25:
            return pool[rng.integers(len(pool))]
        scene = sample_scene(rng, "train")
        image = render(scene, rng)
        return scene, image, degrade(image, rng)

    def make_batch(rng, half=48):
        scenes, clean, spoiled = zip(*(draw(rng) for _ in range(half)), strict=True)
        ids = tokenize([scene.caption() for scene in scenes])
        return {"images": np.stack(clean + spoiled), "ids": np.concatenate([ids, ids])}

    def loss_fn(trained, batch, _):
        model = nnx.merge(graph, training.join(text, trained["vision"]))
        loss, image = contrastive_loss(model, batch)
        high, low = jnp.split(nnx.merge(head_graph, trained["head"])(image), 2)
        ordered = -jax.nn.log_sigmoid(high - low).mean()
        return loss + ordered + 0.05 * (jnp.square(high - 7.0) + jnp.square(low - 3.0)).mean()

    trained = training.fit(
        "aesthetic", workdir, {"vision": vision, "head": head}, loss_fn, make_batch,
        steps=steps, learning_rate=5e-4, weight_decay=0.02, ema=0.99,
    )  # fmt: skip
    clip, head = training.join(text, trained["vision"]), trained["head"]
    training.save(CLIPModel, output / "clip", clip)
    write_tensors(output / "aesthetic.safetensors", weights.stored_tensors(head, np.float16))

    @jax.jit
    def score(images):
        image = nnx.merge(graph, clip).get_image_features(training.clip_pixels(images))
        return nnx.merge(head_graph, head)(training.unit(image))

    _, clean = training.renders(1000, "heldout", 23)
    rng = np.random.default_rng(24)
    spoiled = np.stack([degrade(image, rng) for image in clean])
    spoiled[::4] = rough(clean[::4], 25)
    above = training.in_batches(score, clean) > training.in_batches(score, spoiled)
    return {"clean_above_degraded": float(above.mean())} | retrieval(graph, clip, tokenize)


STAGES: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "clip": train_clip,
    "vae": train_vae,
    "unet": train_unet,
    "blip2": train_blip2,
    "blip2_generated": train_blip2_generated,
    "aesthetic": train_aesthetic,
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
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"there is no stage {min(unknown)!r}; there are: {', '.join(STAGES)}")
    for name in options.stages or STAGES:
        figures_path = options.output / "figures.json"
        figures = json.loads(figures_path.read_text()) if figures_path.exists() else {}
        if name in figures:
            print(f"{name}: done before: {figures[name]}", flush=True)
            continue
        folders.prepare(options.output)
        result = STAGES[name](options.workdir, options.output)
        figures[name] = {key: round(value, 4) for key, value in result.items()}
        folders.write_json(figures_path, figures)
        print(f"{name}: {figures[name]}", flush=True)


if __name__ == "__main__":
    main()
