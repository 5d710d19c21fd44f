"""Single files against the originals: latent-diffusion's key lists, and diffusers' converters."""

import json

import numpy as np
import pytest
import torch

from agfsync_jax.models.clip import CLIPTextModel
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.weights.networks import fit
from agfsync_jax.weights.single_files import _FAMILIES, ldm_unet_name, split_single_file
from agfsync_jax.weights.skeletons import KINDS, write_skeleton
from tests.originals import (
    at,
    clip_text,
    filled,
    from_arrays,
    ldm_unet,
    ldm_vae,
    open_clip_text,
    torch_shapes,
    unread,
)

SCHEDULE = dict.fromkeys(
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod "
    "posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 "
    "logvar".split(),
    (1000,),
)
EMA = {
    "model_ema.decay": (),
    "model_ema.num_updates": (),
    "model_ema.diffusion_modelout2bias": (4,),
}
VAE = at("first_stage_model", ldm_vae(128, (1, 2, 4, 4), 2))
REFINER = {"channels": 384, "mult": (1, 2, 4, 4), "layers": 2, "depth": (0, 4, 4, 0)}

# Kind -> (key -> shape of the released single file).
RELEASED = {
    "stable-diffusion-v1-5": (
        at(
            "model.diffusion_model",
            ldm_unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 768, linear=False),
        )
        | VAE
        | at("cond_stage_model.transformer", clip_text(768, 12))
        | SCHEDULE
        | EMA
    ),
    "stable-diffusion-2": (
        at("model.diffusion_model", ldm_unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024))
        | VAE
        | at("cond_stage_model.model", open_clip_text(1024, 24))
        | SCHEDULE
        | EMA
    ),
    "sd-turbo": (  # written by generative-models
        at("model.diffusion_model", ldm_unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 1024))
        | VAE
        | at("conditioner.embedders.0.model", open_clip_text(1024, 24))
        | {"denoiser.sigmas": (1000,)}
    ),
    "stable-diffusion-xl-base": (
        at("model.diffusion_model", ldm_unet(320, (1, 2, 4), 2, (0, 2, 10), 2048, adm=2816))
        | VAE
        | at("conditioner.embedders.0.transformer", clip_text(768, 12))
        | at("conditioner.embedders.1.model", open_clip_text(1280, 32))
        | {"denoiser.sigmas": (1000,)}
    ),
    "stable-diffusion-xl-refiner": (
        at("model.diffusion_model", ldm_unet(**REFINER, context=1280, adm=2560))
        | VAE
        | at("conditioner.embedders.0.model", open_clip_text(1280, 32))
        | {"denoiser.sigmas": (1000,)}
    ),
}


def torch_model(folder, part):
    """The torch module of a config.json, without memory."""
    import diffusers
    import transformers

    config = json.loads((folder / part / "config.json").read_text())
    with torch.device("meta"):
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        name = config["architectures"][0]
        return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


# --- Single files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RELEASED)
def test_every_key_of_a_released_file_has_its_place(kind, tmp_path):
    told = kind if kind in ("stable-diffusion-2", "sd-turbo") else None
    found, parts = split_single_file(unread(RELEASED[kind]), told)
    assert found == kind
    write_skeleton(kind, tmp_path)
    assert set(parts) == {file.parent.name for file in tmp_path.glob("*/config.json")}
    for part, tensors in parts.items():
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        assert shapes == torch_shapes(torch_model(tmp_path, part)), part


def test_a_split_file_fills_our_networks(tmp_path):
    """By our own key tables too, in which nothing is left over."""
    kind, parts = split_single_file(unread(RELEASED["stable-diffusion-v1-5"]))
    write_skeleton(kind, tmp_path)
    for part, cls in (
        ("unet", UNet2DConditionModel),
        ("vae", AutoencoderKL),
        ("text_encoder", CLIPTextModel),
    ):
        config = json.loads((tmp_path / part / "config.json").read_text())
        fit(cls, cls.config_class.from_dict(config), parts[part])


# A tiny file a family: what its UNet, autoencoder and text encoders look like.
TINY = {
    "stable-diffusion-v1-5": {
        "unet": {"channels": 8, "mult": (1, 2, 2), "layers": 1, "depth": (1, 1, 0), "context": 16},
        "linear": False,
        "texts": {"cond_stage_model.transformer": clip_text(16, 2, 99, 7)},
        "diffusers": {"layers_per_block": 1},
    },
    "stable-diffusion-2": {
        "unet": {"channels": 8, "mult": (1, 2), "layers": 2, "depth": (1, 0), "context": 16},
        "texts": {"cond_stage_model.model": open_clip_text(8, 24, 99, 7)},
        "diffusers": {"layers_per_block": 2},
    },
    "stable-diffusion-xl-base": {
        "unet": {"channels": 8, "mult": (1, 2), "layers": 2, "depth": (0, 3), "context": 16},
        "adm": 24,
        "texts": {
            "conditioner.embedders.0.transformer": clip_text(8, 2, 99, 7),
            "conditioner.embedders.1.model": open_clip_text(16, 3, 99, 7),
        },
        "diffusers": {"layers_per_block": 2, "addition_embed_type": "text_time"},
    },
    "stable-diffusion-xl-refiner": {
        "unet": {"channels": 8, "mult": (1, 2, 2), "layers": 1, "depth": (0, 2, 0), "context": 16},
        "adm": 24,
        "texts": {"conditioner.embedders.0.model": open_clip_text(16, 3, 99, 7)},
        "diffusers": {"layers_per_block": 1, "addition_embed_type": "text_time"},
    },
}


def tiny_file(kind):
    tiny = TINY[kind]
    unet = ldm_unet(**tiny["unet"], linear=tiny.get("linear", True), adm=tiny.get("adm"))
    keys = at("model.diffusion_model", unet)
    keys |= at("first_stage_model", ldm_vae(8, (1, 2, 2), 1))
    for prefix, text in tiny["texts"].items():
        keys |= at(prefix, text)
    return filled(keys)


def assert_same(tensors, expected):
    assert set(tensors) == set(expected)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[key].numpy(), err_msg=key)


@pytest.mark.parametrize("kind", TINY)
def test_unet_and_autoencoder_equal_diffusers_converters(kind):
    from diffusers.loaders import single_file_utils as theirs

    arrays = tiny_file(kind)
    _, parts = split_single_file(from_arrays(arrays), kind)
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    config = TINY[kind]["diffusers"]
    assert_same(parts["unet"], theirs.convert_ldm_unet_checkpoint(dict(state), config))
    config = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    assert_same(parts["vae"], theirs.convert_ldm_vae_checkpoint(dict(state), config))


@pytest.mark.parametrize("kind", TINY)
def test_text_encoders_equal_diffusers_converters(kind):
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    arrays = tiny_file(kind)
    _, parts = split_single_file(from_arrays(arrays), kind)
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    for prefix in TINY[kind]["texts"]:
        if prefix.endswith("transformer"):
            expected = theirs.convert_ldm_clip_checkpoint(state)
            expected.pop("text_model.embeddings.position_ids")
            assert_same(parts["text_encoder"], expected)
            continue
        config = CLIPTextConfig(hidden_size=8, num_attention_heads=1, vocab_size=99)
        with torch.device("meta"):
            model = CLIPTextModelWithProjection(config)
        expected = theirs.convert_open_clip_checkpoint(model, state, prefix=f"{prefix}.")
        part = "text_encoder" if kind == "stable-diffusion-2" else "text_encoder_2"
        assert_same(parts[part], expected)


def test_stable_diffusion_2_uses_23_layers():
    keys = at("cond_stage_model.model", open_clip_text(8, 24, 99, 7))
    arrays = tiny_file("stable-diffusion-2")
    _, parts = split_single_file(from_arrays(arrays | filled(keys)), "stable-diffusion-2-base")
    layers = {key.split(".")[3] for key in parts["text_encoder"] if ".layers." in key}
    assert layers == {str(i) for i in range(23)}
    assert not any("projection" in key for key in parts["text_encoder"])
    # Files that other programs wrote may have left the last one out already.
    cut = {key: value for key, value in arrays.items() if "resblocks.23" not in key}
    assert set(split_single_file(from_arrays(cut), "sd-turbo")[1]["text_encoder"]) == set(
        parts["text_encoder"]
    )


def test_spellings_that_merging_programs_write():
    arrays = tiny_file("stable-diffusion-xl-base")
    text = "conditioner.embedders.0.transformer."
    bare = {key.replace(f"{text}text_model.", text): value for key, value in arrays.items()}
    bare[f"{text}text_projection.weight"] = np.zeros((8, 8), np.float32)
    bare["conditioner.embedders.0.logit_scale"] = np.zeros((), np.float32)
    bare["conditioner.embedders.1.model.attn_mask"] = np.zeros((7, 7), np.float32)
    for key in list(bare):
        if ".attn_1." in key and bare[key].ndim == 4:
            bare[key] = bare[key][:, :, 0, 0]
    expected = split_single_file(from_arrays(arrays))[1]
    for part, tensors in split_single_file(from_arrays(bare))[1].items():
        assert_same(tensors, {key: torch.from_numpy(t.read()) for key, t in expected[part].items()})


def test_kinds_are_those_that_have_a_skeleton():
    assert sorted(kind for _, kinds in _FAMILIES.values() for kind in kinds) == sorted(KINDS)


def test_a_stable_diffusion_2_must_be_named():
    tensors = from_arrays(tiny_file("stable-diffusion-2"))
    with pytest.raises(ValueError, match="'stable-diffusion-2' predicts velocity") as error:
        split_single_file(tensors)
    assert "'stable-diffusion-2-base'" in str(error.value)
    assert split_single_file(tensors, "stable-diffusion-2-base")[0] == "stable-diffusion-2-base"


def test_a_kind_of_another_family_is_refused():
    tensors = from_arrays(tiny_file("stable-diffusion-xl-base"))
    assert split_single_file(tensors, "sdxl-turbo")[0] == "sdxl-turbo"
    with pytest.raises(ValueError, match="is of Stable Diffusion XL: expected stable-diffusion-xl"):
        split_single_file(tensors, "stable-diffusion-v1-5")


def test_what_is_missing_and_what_is_unknown_is_told_at_once():
    keys = {
        key: shape
        for key, shape in RELEASED["stable-diffusion-xl-base"].items()
        if not key.startswith(("first_stage_model.", "conditioner.embedders.1."))
    }
    with pytest.raises(ValueError) as error:
        split_single_file(unread(keys | {"refiner.weight": (3,)}))
    text = str(error.value)
    assert "of Stable Diffusion XL for" in text
    assert "lacks the autoencoder (first_stage_model.*)" in text
    assert "conditioner.embedders.*.model.*" in text
    assert "embedders.0.transformer" not in text
    assert "1 unknown keys: refiner.weight" in text


@pytest.mark.parametrize("kind", RELEASED)
def test_a_unet_alone_lacks_the_rest(kind):
    keys = {key: shape for key, shape in RELEASED[kind].items() if "diffusion_model." in key}
    with pytest.raises(ValueError, match="lacks the autoencoder .*; it lacks the text encoder"):
        split_single_file(unread(keys))


@pytest.mark.parametrize(
    "channels, what",
    [(9, "an inpainting"), (5, "a depth"), (8, "an image-editing"), (6, "another")],
)
def test_unets_that_take_more_than_latents_are_refused(channels, what):
    unet = ldm_unet(320, (1, 2, 4, 4), 2, (1, 1, 1, 0), 768, linear=False, inputs=channels)
    keys = RELEASED["stable-diffusion-v1-5"] | at("model.diffusion_model", unet)
    with pytest.raises(ValueError, match=f"takes {channels} channels, not 4: it is of {what} mod"):
        split_single_file(unread(keys))


@pytest.mark.parametrize(
    "key, what",
    [
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "weights of a LoRA"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "weights of a LoRA"),
        ("unet.up_blocks.1.attentions.0.to_q.lora.down.weight", "weights of a LoRA"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("control_model.time_embed.0.weight", "ControlNet"),
        ("v_pred", "v-prediction"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network in diffusers' keys"),
        ("text_model.final_layer_norm.bias", "a CLIP in transformers' keys"),
        ("visual.conv1.weight", "a CLIP"),
        ("decoder.mid.attn_1.q.weight", "an autoencoder alone"),
    ],
)
def test_other_files_are_recognized(key, what):
    with pytest.raises(ValueError, match=f"seems to be .*{what}.*holds {key}"):
        split_single_file(unread({key: (4, 4)}))


def test_any_other_file_lacks_everything():
    with pytest.raises(ValueError, match=r"lacks the UNet .*2 unknown keys: a, b\."):
        split_single_file(unread({"a": (1,), "b": (2,)}))


def test_every_name_is_understood_without_its_leaf_and_with_underscores():
    for keys in RELEASED.values():
        for key in keys:
            name = key.removeprefix("model.diffusion_model.")
            if name != key:
                module = name.rsplit(".", 1)[0]
                assert ldm_unet_name(name) == f"{ldm_unet_name(module)}.{name.rsplit('.', 1)[1]}"
                kohya = module.replace(".", "_")
                assert ldm_unet_name(kohya) == ldm_unet_name(module).replace(".", "_")


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks.1.0.in_layers.2", "down_blocks.0.resnets.0.conv1"),
        ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),  # no attention there
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("time_embed.0", "time_embedding.linear_1"),
        ("input_blocks_4_1_proj_in", "down_blocks_1_attentions_0_proj_in"),
        ("middle_block_2_in_layers_2", "mid_block_resnets_1_conv1"),
        ("input_blocks.1.0.strange", None),
        ("middle_block.3.proj_in", None),
        ("down_blocks.0.resnets.0.conv1", None),
    ],
)
def test_names_of_unet_modules(name, expected):
    assert ldm_unet_name(name) == expected
