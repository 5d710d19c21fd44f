"""Stable Diffusion XL against diffusers' pipelines: base and refiner, there and back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.backbones import stable_diffusion
from agfsync_jax.backbones.stable_diffusion_xl import Backbone
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.samplers import euler
from tests.twins import tiny_stable_diffusion_xl

PROMPTS = ["red circle", "blue square on a red square and a circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sdxl") / "base"


@pytest.fixture(scope="module")
def pipeline(folder):
    return tiny_stable_diffusion_xl(folder)


@pytest.fixture(scope="module")
def backbone(folder, pipeline):
    return Backbone.load(folder)


@pytest.fixture(scope="module")
def refiner_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "refiner"
    pipeline = tiny_stable_diffusion_xl(folder, seed=1, refiner=True)
    pipeline.folder = folder
    return pipeline


def encode(backbone, prompts):
    tokens = jnp.asarray(backbone.tokenize(prompts))
    return jax.jit(backbone.encode_prompt)(backbone.params, tokens)


def test_conditioning_equals_diffusers(pipeline, backbone):
    with torch.no_grad():
        hidden, zeros, pooled, pooled_zeros = pipeline.encode_prompt(PROMPTS)
    ours = encode(backbone, PROMPTS)
    np.testing.assert_allclose(ours["encoder_hidden_states"], hidden.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours["text_embeds"], pooled.numpy(), atol=1e-5)
    empty = encode(backbone, ["", ""])
    np.testing.assert_array_equal(empty["encoder_hidden_states"], zeros.numpy())
    np.testing.assert_array_equal(empty["text_embeds"], pooled_zeros.numpy())
    tokens = backbone.tokenize(["red"])
    assert tokens.shape == (1, 24) and tokens[0, 11] != tokens[0, 23]  # each its own padding


@pytest.mark.parametrize("negative", ["", "blue"])
def test_images_equal_diffusers(pipeline, backbone, negative):
    noise = np.random.default_rng(0).normal(size=(2, 16, 24, 4)).astype(np.float32)
    kwargs = {"prompt": PROMPTS, "height": 32, "width": 48, "num_inference_steps": 8}
    kwargs |= {"negative_prompt": [negative] * 2 if negative else None, "guidance_scale": 4.0}
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    theirs = pipeline(**kwargs, latents=latents, output_type="np").images

    @jax.jit
    def program(params, tokens, negatives, noise):
        given, unguided = (backbone.encode_prompt(params, ids) for ids in (tokens, negatives))
        denoise = guide(lambda *args: backbone.denoise(params, *args), given, unguided, 4.0)
        final = euler.SAMPLER(denoise, backbone.schedule, noise, 8)
        return backbone.decode_latents(params, final)

    tokens, negatives = (backbone.tokenize(texts) for texts in (PROMPTS, [negative] * 2))
    ours = np.asarray(program(backbone.params, tokens, negatives, noise))
    assert ours.std() > 1
    assert np.abs(ours - theirs * 255).max() <= 2


def test_the_refiner_equals_diffusers(refiner_pipeline):
    backbone = Backbone.load(refiner_pipeline.folder)
    assert sorted(backbone.params) == ["text_encoder_2", "unet", "vae"]
    with torch.no_grad():
        hidden, _, pooled, _ = refiner_pipeline.encode_prompt(PROMPTS)
        latents = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 16, 16))).float()
        ids = torch.tensor([[32, 32, 0, 0, 6.0]] * 2)
        theirs = refiner_pipeline.unet(
            latents, 100, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    conditioning = encode(backbone, PROMPTS)
    np.testing.assert_allclose(conditioning["text_embeds"], pooled.numpy(), atol=1e-5)
    ours = jax.jit(backbone.denoise)(
        backbone.params, latents.permute(0, 2, 3, 1).numpy(), np.array([100, 100]), conditioning
    )
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-4)


def test_base_and_refiner_together_equal_diffusers(pipeline, backbone, refiner_pipeline):
    """The ensemble of experts: the refiner takes over noisy latents, with guidance of its own."""
    refiner = Backbone.load(refiner_pipeline.folder)
    mesh = create_mesh(devices=jax.devices()[:1])
    drawing = {"num_inference_steps": 10, "guidance_scale": 4.0}
    generate = Generator(
        *(backbone, mesh), **drawing, height=32, width=48, batch_size=2, negative_prompt="circle",
        sampler=euler.SAMPLER, refiner=refiner, refiner_start=0.8,
    )  # fmt: skip
    seeds = [3, 4]
    latents, images = generate(backbone.params, PROMPTS, seeds, [False, False])
    noise = [jax.random.normal(jax.random.key(seed), (16, 24, 4)) for seed in seeds]
    call = drawing | {"prompt": PROMPTS, "negative_prompt": ["circle"] * 2, "output_type": "latent"}
    handed = pipeline(
        **call, height=32, width=48, denoising_end=0.8,
        latents=torch.from_numpy(np.stack(noise)).permute(0, 3, 1, 2),
    ).images  # fmt: skip
    theirs = refiner_pipeline(**call, image=handed, denoising_start=0.8).images
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(latents, theirs, rtol=2e-3, atol=2e-3)  # ours are float16
    with torch.no_grad():
        scaled = torch.from_numpy(theirs).permute(0, 3, 1, 2) / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(scaled).sample.permute(0, 2, 3, 1).numpy()
    pictures = np.clip(pixels / 2 + 0.5, 0, 1) * 255
    assert np.abs(images - pictures).max() <= 2


def test_half_precision_spares_the_autoencoder_that_overflows(folder, pipeline, tmp_path):
    for dtype, force, used in (
        ("float16", True, "float32, as it would overflow in float16"),
        ("float16", False, "float16, as all else"),
        ("bfloat16", True, "bfloat16, as all else"),
    ):
        copy = tmp_path / f"{dtype}-{force}"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "vae/config.json").read_text())
        (copy / "vae/config.json").write_text(json.dumps(config | {"force_upcast": force}))
        backbone = Backbone.load(copy, dtype=dtype)
        assert f"autoencoder in {used}" in backbone.describe()[1]
        latents = jnp.full((1, 16, 24, 4), 0.5)
        images = jax.jit(backbone.decode_latents)(backbone.params, latents)
        program = str(jax.make_jaxpr(backbone.decode_latents)(backbone.params, latents))
        assert images.dtype == jnp.uint8
        assert ("f16[1," in program.replace("bf16", "")) == (used[:7] == "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_goes_there_and_back_to_the_bit(pipeline, tmp_path, dtype):
    """diffusers -> here -> diffusers."""
    from diffusers import StableDiffusionXLPipeline

    kind = getattr(torch, dtype)
    pipeline.to(kind).save_pretrained(tmp_path / "theirs")
    pipeline.to(torch.float32)
    backbone = Backbone.load(tmp_path / "theirs")
    backbone.save(tmp_path / "ours", backbone.params, dtype=np.dtype(dtype))
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "ours", dtype=kind)
    before = StableDiffusionXLPipeline.from_pretrained(tmp_path / "theirs", dtype=kind)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state, expected = (getattr(each, name).state_dict() for each in (again, before))
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert value.dtype == state[key].dtype and torch.equal(state[key], value), key
    assert again.tokenizer_2.pad_token == before.tokenizer_2.pad_token


def test_each_backbone_refuses_the_other_pipeline(folder, pipeline):
    with pytest.raises(ValueError, match="holds a StableDiffusionXLPipeline.*backbone.name"):
        stable_diffusion.Backbone.load(folder)
