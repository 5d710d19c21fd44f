"""The shipped weights: torch reads them as they are and sees what we see; each meets its floor.

The floors are measured on held-out captions, on fewer pictures than the suite's own figures
(weights/figures.json), so the fast tests leave the sampling error as a margin.
"""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.micro import referee
from agfsync_jax.micro.drawing import degrade
from agfsync_jax.micro.questions import ELEMENT_TYPES, fixed_questions
from agfsync_jax.micro.scenes import mutate, sample_scenes
from agfsync_jax.micro.training import clip_pixels, renders
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.samplers import ddim
from agfsync_jax.scorers.aesthetic import Scorer as AestheticScorer
from agfsync_jax.scorers.clip import Scorer as ClipScorer
from agfsync_jax.scorers.vqa import Scorer as VqaScorer
from agfsync_jax.weights.networks import load_model
from agfsync_jax.weights.places import resolve_path
from tests.twins import transformers_answers

WEIGHTS = resolve_path("micro:")
FIGURES = json.loads((WEIGHTS / "figures.json").read_text())


def one_device():
    return create_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])


def held_out(count, seed):
    scenes, images = renders(count, "heldout", seed)
    return scenes, images, [scene.caption() for scene in scenes]


def test_all_of_it_is_small():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6


def test_the_figures_of_the_suite_meet_the_floors():
    assert FIGURES["vae"]["referee_strict"] >= 0.95
    assert 0.35 <= FIGURES["unet"]["referee_strict"] <= 0.65
    assert FIGURES["aesthetic"]["retrieval_of_100"] >= 0.90  # CLIP as it ships
    assert FIGURES["aesthetic"]["clean_above_degraded"] >= 0.95


def test_the_figures_of_blip2_meet_their_floors():
    vqa = FIGURES["blip2_generated"]
    assert vqa["all"] >= 0.95
    assert min(vqa[kind] for kind in ELEMENT_TYPES) >= 0.90


def test_blip2_tracks_the_referee_on_the_base_models_own_pictures():
    assert FIGURES["blip2_generated"]["correlation_probability"] >= 0.6


def test_diffusers_draws_what_we_draw():
    from diffusers import StableDiffusionPipeline

    prompts = [scene.caption() for scene in renders(4, "heldout", 1)[0]]
    pipeline = StableDiffusionPipeline.from_pretrained(str(WEIGHTS / "stable-diffusion"))
    pipeline.set_progress_bar_config(disable=True)
    seeds = np.arange(4, dtype=np.uint32)
    backbone = StableDiffusion.load("micro:stable-diffusion")
    noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (16, 16, 4)))(seeds)
    start = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
    call = {"num_inference_steps": 20, "guidance_scale": 5.0, "latents": start}
    theirs = pipeline(prompts, **call, output_type="latent").images.permute(0, 2, 3, 1).numpy()
    pictures = pipeline(prompts, **call, output_type="np").images
    generator = Generator(
        backbone, one_device(), height=64, width=64, num_inference_steps=20, guidance_scale=5.0,
        batch_size=4, sampler=ddim.SAMPLER,
    )  # fmt: skip
    given, unguided = (
        [jax.jit(backbone.encode_prompt)(backbone.params, backbone.tokenize(texts))]
        for texts in (prompts, [""])
    )
    latents, images = generator._draw_program(
        (backbone.params,), unguided, given, seeds, np.zeros(4, bool)
    )
    assert np.abs(np.asarray(latents) - theirs).max() <= 1e-3
    assert np.abs(np.asarray(images) / 255.0 - pictures).mean() <= 2 / 255


def test_transformers_sees_the_clip_logits_that_we_see():
    from transformers import CLIPModel as TorchCLIP

    from agfsync_jax.data.tokenizers import ClipTokenizer

    _, images, captions = held_out(16, 2)
    twin = TorchCLIP.from_pretrained(str(WEIGHTS / "clip")).eval()
    graph, params = load_model(CLIPModel, WEIGHTS / "clip")
    pixels = np.asarray(clip_pixels(images))
    ids = ClipTokenizer(WEIGHTS / "clip")(captions)
    with torch.no_grad():
        expected = twin(
            input_ids=torch.from_numpy(ids).long(),
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        ).logits_per_image.numpy()
    model = nnx.merge(graph, params)
    image, text = model.get_image_features(pixels), model.get_text_features(ids)
    image = image / np.linalg.norm(image, axis=-1, keepdims=True)
    text = text / np.linalg.norm(text, axis=-1, keepdims=True)
    logits = np.exp(model.logit_scale[...]) * image @ text.T
    assert np.abs(np.asarray(logits) - expected).max() <= 1e-3


@pytest.mark.slow  # scorers/vqa_test.py has fewer of them
def test_transformers_gives_the_answers_that_we_give():
    scenes, images, captions = held_out(20, 3)
    asked = [fixed_questions(scene)[:10] for scene in scenes]
    scorer = VqaScorer(one_device(), path="micro:blip2", prompt="{question}")
    ours = [row for of_image in scorer(images, captions, asked)["answers"] for row in of_image]
    rows = [(image, row) for image, each in zip(images, asked, strict=True) for row in each]
    assert len(rows) >= 180
    probabilities, greedy = transformers_answers(
        WEIGHTS / "blip2",
        [image for image, _ in rows],
        [row["question"] for _, row in rows],
        [row["choices"] for _, row in rows],
    )
    for (_, row), answer, expected, text in zip(rows, ours, probabilities, greedy, strict=True):
        assert answer["answer"] == row["choices"][int(np.argmax(expected))]
        assert abs(answer["p_expected"] - expected[row["choices"].index(row["answer"])]) <= 1e-4
        if text in row["choices"]:
            assert text == answer["answer"]


def test_scorers_meet_their_floors_on_clean_renders():
    scenes, images, captions = held_out(200, 4)
    rng = np.random.default_rng(4)
    asked = [fixed_questions(scene) for scene in scenes]
    vqa = VqaScorer(one_device(), path="micro:blip2", prompt="{question}")
    assert vqa(images, captions, asked)["vqa"].mean() >= 0.95

    aesthetic = AestheticScorer(one_device(), path="micro:clip", head="micro:aesthetic.safetensors")
    spoiled = np.stack([degrade(image, rng) for image in images])
    clean = aesthetic(images, captions, asked)["aesthetic"]
    assert (clean > aesthetic(spoiled, captions, asked)["aesthetic"]).mean() >= 0.93

    clip = ClipScorer(one_device(), path="micro:clip")
    own = clip(images, captions, asked)["clip"]
    changed = [mutate(scene, rng).caption() for scene in scenes]
    assert (own > clip(images, changed, asked)["clip"]).mean() >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("count", [32])
def test_the_base_model_draws_recognizable_imperfect_scenes(count):
    scenes = sample_scenes(np.random.default_rng(5), count, "heldout", unique=True)
    backbone = StableDiffusion.load("micro:stable-diffusion")
    generator = Generator(
        backbone, one_device(), height=64, width=64, num_inference_steps=16, guidance_scale=3.0,
        batch_size=32, sampler=ddim.SAMPLER,
    )  # fmt: skip
    _, images = generator(
        backbone.params, [scene.caption() for scene in scenes], range(count), [False] * count
    )
    checks = [referee.judge(*pair) for pair in zip(images, scenes, strict=True)]
    assert 0.25 <= np.mean([referee.strict(each) for each in checks]) <= 0.75
    assert np.mean([referee.mean(each) for each in checks]) >= 0.75
