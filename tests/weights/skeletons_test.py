"""Folders without weights: diffusers, transformers and this package read the same from them."""

import json

import numpy as np
import pytest

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.weights.skeletons import KINDS, write_skeleton

NETWORKS = {
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}
# Millions of parameters as published: the UNet and the text encoders together.
SIZES = {
    "stable-diffusion-v1-5": (860, 123),
    "stable-diffusion-2-base": (866, 340),
    "stable-diffusion-2": (866, 340),
    "sd-turbo": (866, 340),
    "stable-diffusion-xl-base": (2567, 123 + 695),
    "stable-diffusion-xl-refiner": (2260, 695),
    "sdxl-turbo": (2567, 123 + 695),
}


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_that_the_index_lists_is_there_and_understood(kind, tmp_path):
    write_skeleton(kind, tmp_path / "deep/folder")
    folder = tmp_path / "deep/folder"
    index = read(folder / "model_index.json")
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0]}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(parts)
    for name, (_, cls) in parts.items():
        if cls in NETWORKS:
            NETWORKS[cls].config_class.from_dict(read(folder / name / "config.json"))
        elif name.startswith("tokenizer"):
            assert ClipTokenizer(folder / name)(["a cat"]).shape == (1, 77)
    Schedule.from_config(read(folder / "scheduler/scheduler_config.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_builds_networks_of_the_published_sizes(kind, tmp_path):
    import diffusers
    import torch
    import transformers

    write_skeleton(kind, tmp_path)
    unet, text = 0, 0
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(read(tmp_path / "unet/config.json"))
        for file in sorted(tmp_path.glob("text_encoder*/config.json")):
            config = transformers.CLIPTextConfig(**read(file))
            text += getattr(transformers, config.architectures[0])(config).num_parameters()
        vae = diffusers.AutoencoderKL.from_config(read(tmp_path / "vae/config.json"))
    millions = tuple(count / 1e6 for count in (unet.num_parameters(), text))
    np.testing.assert_allclose(millions, SIZES[kind], atol=1)
    np.testing.assert_allclose(vae.num_parameters() / 1e6, 83.7, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_makes_the_same_schedule(kind, tmp_path):
    import diffusers

    write_skeleton(kind, tmp_path)
    config = read(tmp_path / "scheduler/scheduler_config.json")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    ours = Schedule.from_config(config)
    np.testing.assert_allclose(ours.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=1e-5)
    assert ours.prediction_type == scheduler.config.prediction_type
    assert (ours.prediction_type == "v_prediction") == (kind == "stable-diffusion-2")
    assert (ours.config.get("timestep_spacing") == "trailing") == ("turbo" in kind)


@pytest.mark.parametrize(
    "kind, pads",
    [
        ("stable-diffusion-v1-5", {"tokenizer": 49407}),
        ("stable-diffusion-2", {"tokenizer": 0}),
        ("stable-diffusion-xl-base", {"tokenizer": 49407, "tokenizer_2": 0}),
        ("stable-diffusion-xl-refiner", {"tokenizer_2": 0}),
    ],
)
def test_tokenizers_pad_as_the_released_ones(kind, pads, tmp_path):
    write_skeleton(kind, tmp_path)
    found = {path.name: ClipTokenizer(path).pad_id for path in tmp_path.glob("tokenizer*")}
    assert found == pads


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'sd3': expected one of stable-diffusion-v1-5"):
        write_skeleton("sd3", tmp_path)
    assert not any(tmp_path.iterdir())
