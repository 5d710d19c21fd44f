"""The backbone against diffusers' StableDiffusionPipeline, there and back."""

import functools
import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from agfsync_jax import samplers
from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.generation import Generator
from agfsync_jax.parallel import sharding
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.samplers import ddim
from tests.twins import tiny_stable_diffusion

PROMPTS = ["red circle", "blue square on a red square and a circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stable_diffusion")


@pytest.fixture(scope="module")
def pipeline(folder):
    return tiny_stable_diffusion(folder)


@pytest.fixture(scope="module")
def backbone(folder, pipeline):
    return Backbone.load(folder)


def draw(backbone, noise, num_steps, guidance_scale):
    @jax.jit
    def program(params, tokens, negative, noise):
        conditioning, unconditional = (
            backbone.encode_prompt(params, ids) for ids in (tokens, negative)
        )
        denoise = guide(
            lambda *args: backbone.denoise(params, *args),
            conditioning,
            unconditional,
            guidance_scale,
        )
        latents = ddim.SAMPLER(denoise, backbone.schedule, noise, num_steps)
        return latents, backbone.decode_latents(params, latents)

    tokens, negative = (backbone.tokenize(texts) for texts in (PROMPTS, [""] * len(PROMPTS)))
    return jax.device_get(program(backbone.params, tokens, negative, noise))


def draw_diffusers(pipeline, noise, num_steps, guidance_scale):
    latents = torch.from_numpy(noise).permute(0, 3, 1, 2)
    kwargs = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale}
    kwargs |= {"prompt": PROMPTS, "height": 32, "width": 32, "latents": latents}
    final = pipeline(**kwargs, output_type="latent").images
    with torch.no_grad():
        pixels = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
    images = pipeline.image_processor.postprocess(pixels, output_type="np")
    return final.permute(0, 2, 3, 1).numpy(), (images * 255).round().astype(np.uint8)


def test_images_equal_diffusers(pipeline, backbone):
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
    theirs, their_images = draw_diffusers(pipeline, noise, 20, 5.0)
    ours, our_images = draw(backbone, noise, 20, 5.0)
    assert np.abs(ours - theirs).max() <= 1e-3
    assert np.abs(our_images.astype(float) - their_images).mean() <= 2
    assert our_images.std() > 1


# Stable Diffusion 1.4's scheduler_config.json, and an earlier one.
PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
EARLIER = {
    name: PUBLISHED[name] for name in PUBLISHED if name not in ("steps_offset", "clip_sample")
}
EARLIER["_diffusers_version"] = "0.2.2"


@pytest.fixture(scope="module")
def parts(backbone):
    """The conditioning, and the denoiser and decoder as programs that all samplers share."""
    tokens, negative = (backbone.tokenize(texts) for texts in (PROMPTS, [""] * len(PROMPTS)))
    given, unguided = (
        jax.jit(backbone.encode_prompt)(backbone.params, ids) for ids in (tokens, negative)
    )

    @jax.jit
    def denoise(params, latents, timesteps):
        return guide(lambda *args: backbone.denoise(params, *args), given, unguided, 4.5)(
            latents, timesteps
        )

    return functools.partial(denoise, backbone.params), jax.jit(backbone.decode_latents)


def loop(body, state, rows):
    """jax.lax.scan, whose body is not compiled."""
    for index in range(len(rows["timestep"])):
        state, _ = body(state, {name: row[index] for name, row in rows.items()})
    return state, None


@pytest.mark.parametrize("sampler", ["", "ddim", "euler", "dpmsolver_multistep"])
@pytest.mark.parametrize("file", [PUBLISHED, EARLIER], ids=["published", "earlier"])
def test_files_of_2022_draw_as_in_diffusers(
    file, sampler, folder, pipeline, backbone, parts, tmp_path, monkeypatch
):
    """diffusers' pipeline takes steps_offset 1 and clip_sample False where a file has neither."""
    path = tmp_path / "scheduler/scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(file))
    for part in folder.iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    schedule = Backbone.read_schedule(Backbone.open(tmp_path))
    found = samplers.find(sampler, schedule)

    kind = type(pipeline)
    if sampler:
        scheduler = getattr(diffusers, found.scheduler).from_config(file, **found.variant)
        networks = {**pipeline.components, "scheduler": scheduler}
        theirs = kind(**networks, requires_safety_checker=False)
    else:
        theirs = kind.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
    their_latents, their_images = draw_diffusers(theirs, noise, 6, 4.5)

    denoise, decode = parts
    monkeypatch.setattr(jax.lax, "scan", loop)
    latents = found(denoise, schedule, noise, 6)
    monkeypatch.undo()
    assert np.abs(latents - their_latents).max() <= 1e-3
    images = np.asarray(decode(backbone.params, latents)).astype(int)
    assert np.abs(images - their_images).max() <= 2
    assert images.std() > 1


def test_tokens_and_hidden_states_equal_transformers(pipeline, backbone):
    tokens = backbone.tokenize(PROMPTS)
    theirs = pipeline.tokenizer(PROMPTS, padding="max_length", truncation=True)["input_ids"]
    assert tokens.tolist() == theirs
    with torch.no_grad():
        hidden = pipeline.text_encoder(torch.tensor(theirs))[0].numpy()
    ours = backbone.encode_prompt(backbone.params, jnp.asarray(tokens))["encoder_hidden_states"]
    np.testing.assert_allclose(ours, hidden, atol=1e-5)


def test_encode_image_is_the_scaled_posterior_mean(pipeline, backbone):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
    ours = backbone.encode_image(backbone.params, jnp.asarray(images))
    np.testing.assert_allclose(ours, mean.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_a_saved_folder_loads_in_diffusers(pipeline, backbone, tmp_path):
    from diffusers import StableDiffusionPipeline

    params = dict(backbone.params)
    params["unet"] = jax.tree.map(lambda x: x * 1.5, params["unet"])
    backbone.save(tmp_path / "saved", params)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert again.safety_checker is None
    for name in ("unet", "vae", "text_encoder"):
        scale = 1.5 if name == "unet" else 1.0
        saved = getattr(again, name).state_dict()
        for key, value in getattr(pipeline, name).state_dict().items():
            torch.testing.assert_close(saved[key], value * scale, rtol=1e-6, atol=1e-7)
    with pytest.raises(FileExistsError, match="not empty"):
        backbone.save(tmp_path / "saved", params)


def test_parameters_load_straight_into_their_shardings(folder, pipeline):
    mesh = create_mesh({"data": 2, "fsdp": 4})
    rules = [(r"(to_q|to_k|to_v)\.kernel", (None, "fsdp"))]
    backbone = Backbone.load(folder, mesh=mesh, rules=rules)
    block = backbone.params["unet"]["down_blocks"][0]["attentions"][0]["transformer_blocks"][0]
    assert block["attn1"]["to_q"]["kernel"][...].sharding.spec == PartitionSpec(None, "fsdp")
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(backbone.params))


def test_candidates_are_the_same_on_one_device_and_on_eight(folder, pipeline, monkeypatch):
    """In float32, before latents are rounded for the disk."""
    monkeypatch.setattr(sharding, "_SMALL", 0)
    prompts, seeds = [*PROMPTS, "", "circle"] * 2, np.arange(8, dtype=np.uint32)
    perturb = np.arange(8) % 4 > 0
    drawn = {}
    for name, spec, rules in (
        ("one", {"data": 1}, ()),
        (
            "all",
            {"data": 2, "fsdp": 2, "tensor": 2},
            [(r"attn.*(to_q|to_k|to_v)\.kernel", ("fsdp", "tensor"))],
        ),
    ):
        mesh = create_mesh(spec, devices=jax.devices()[: math.prod(spec.values())])
        backbone = Backbone.load(folder, mesh=mesh, rules=rules)
        generate = Generator(
            backbone,
            mesh,
            sampler=ddim.SAMPLER,
            height=32,
            width=32,
            num_inference_steps=6,
            guidance_scale=3.0,
            batch_size=8,
            conditioning_noise=0.1,
        )
        tokens, negative = backbone.tokenize(prompts), backbone.tokenize([""])
        encode = jax.jit(backbone.encode_prompt)
        given, unguided = (
            jax.device_get([encode(backbone.params, ids)]) for ids in (tokens, negative)
        )
        drawn[name] = jax.device_get(
            generate._draw_program((backbone.params,), unguided, given, seeds, perturb)
        )
    latents, images = drawn.pop("one")
    for other_latents, other_images in drawn.values():
        assert np.abs(latents - other_latents).max() <= 1e-4 * max(1.0, np.abs(latents).max())
        assert np.abs(images.astype(int) - other_images.astype(int)).max() <= 1


def test_latent_shape(backbone):
    assert backbone.latent_shape(32, 64) == (16, 32, 4)
    with pytest.raises(ValueError, match="34x32 pixels.*multiples of 4"):
        backbone.latent_shape(34, 32)


def test_other_folders_are_refused(folder, pipeline, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionXLPipeline"):
        Backbone.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        Backbone.load("no/such/folder")


def test_inpainting_models_are_refused(folder, pipeline, tmp_path):
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "unet").unlink()
    config = dict(pipeline.unet.config) | {"in_channels": 9}
    type(pipeline.unet)(**config).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="takes 9 and gives 4 channels"):
        Backbone.load(tmp_path)
