"""Diffusers folders without weights, of the models whose weights are released in single files."""

import json
from pathlib import Path
from typing import Any

from agfsync_jax.data.images import OPENAI_MEAN, OPENAI_STD
from agfsync_jax.data.tokenizers import write_clip_tokenizer

_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # wrong and kept: it means the largest id
    "pad_token_id": 1,
}
_OPEN_CLIP_H = _CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the last one is not used
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPEN_CLIP_BIGG = _CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

_UNET_SD1 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.21.0",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_UNET_SD2 = _UNET_SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,  # 2.1 leaves the range of float16 without; here it has no effect
}
_UNET_XL = _UNET_SD1 | {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,  # 1280 + 6 * 256
}
_UNET_REFINER = _UNET_XL | {
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,  # 1280 + 5 * 256
}

_VAE_SD = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.21.0",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_VAE_XL = _VAE_SD | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}

_NOISE = {
    "_diffusers_version": "0.21.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PNDM = _NOISE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM_V = _NOISE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
_EULER = _NOISE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_EULER_TURBO = _EULER | {"timestep_spacing": "trailing"}
_ANCESTRAL_TURBO = _EULER_TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"}

_END, _NOTHING = "<|endoftext|>", "!"  # what tokenizers pad with; "!" has the id 0
_SD1_TEXT = {"text_encoder": (_CLIP_L, _END)}
_SD2_TEXT = {"text_encoder": (_OPEN_CLIP_H, _NOTHING)}
_REFINER_TEXT = {"text_encoder_2": (_OPEN_CLIP_BIGG, _NOTHING)}
_XL_TEXT = _SD1_TEXT | _REFINER_TEXT

_SD, _XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_BARE = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
_XL_INDEX = {"force_zeros_for_empty_prompt": True}
_REFINER_INDEX = {
    **{"text_encoder": [None, None], "tokenizer": [None, None]},
    **{"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}

# Kind -> pipeline, what model_index.json says besides, UNet, autoencoder, scheduler, text encoders
# with their tokenizers' padding. The values are those of the folders on huggingface.co:
# stable-diffusion-v1-5/stable-diffusion-v1-5, stabilityai/{stable-diffusion-2, -2-base, sd-turbo,
# stable-diffusion-xl-base-1.0, stable-diffusion-xl-refiner-1.0, sdxl-turbo}.
_KINDS: dict[str, tuple[str, dict, dict, dict, dict, dict]] = {
    # 1.1 to 1.5
    "stable-diffusion-v1-5": (_SD, _BARE, _UNET_SD1, _VAE_SD, _PNDM, _SD1_TEXT),
    # 2.0 and 2.1 of 512 pixels
    "stable-diffusion-2-base": (_SD, _BARE, _UNET_SD2, _VAE_SD, _PNDM, _SD2_TEXT),
    # 2.0 and 2.1 of 768 pixels
    "stable-diffusion-2": (
        *(_SD, _BARE, _UNET_SD2 | {"sample_size": 96}, _VAE_SD | {"sample_size": 768}),
        *(_DDIM_V, _SD2_TEXT),
    ),
    "sd-turbo": (_SD, _BARE, _UNET_SD2, _VAE_SD | {"sample_size": 768}, _EULER_TURBO, _SD2_TEXT),
    "stable-diffusion-xl-base": (_XL, _XL_INDEX, _UNET_XL, _VAE_XL, _EULER, _XL_TEXT),
    "stable-diffusion-xl-refiner": (
        *("StableDiffusionXLImg2ImgPipeline", _REFINER_INDEX, _UNET_REFINER, _VAE_XL),
        *(_EULER, _REFINER_TEXT),
    ),
    "sdxl-turbo": (
        *(_XL, _XL_INDEX, _UNET_XL | {"sample_size": 64}, _VAE_XL, _ANCESTRAL_TURBO, _XL_TEXT),
    ),
}
KINDS = tuple(_KINDS)

_FLAN_T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
_FLAN_T5_XL = _FLAN_T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32}
_FLAN_T5_XXL = _FLAN_T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64}
# The last part of a repository's name -> config.json; what is not said are the defaults.
BLIP2 = {
    "blip2-flan-t5-xl": {"model_type": "blip-2", "text_config": _FLAN_T5_XL},
    "blip2-flan-t5-xxl": {"model_type": "blip-2", "text_config": _FLAN_T5_XXL},
}
BLIP2_RESIZE = {"size": (224, 224), "mean": OPENAI_MEAN, "std": OPENAI_STD, "resize_mode": "squash"}


def write_skeleton(kind: str, folder: str | Path) -> None:
    """Writes a diffusers folder without weights: configs, scheduler and tokenizers.

    The safety filter of Stable Diffusion 1 is left out.

    Args:
        kind: one of `KINDS`.
        folder: made where it is missing.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"Unknown kind of model {kind!r}: expected one of {', '.join(KINDS)}.")
    pipeline, extra, unet, vae, scheduler, texts = _KINDS[kind]
    folder = Path(folder)
    index = {
        "_class_name": pipeline,
        "_diffusers_version": scheduler["_diffusers_version"],
        **extra,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
        "vae": ["diffusers", vae["_class_name"]],
    }
    _write(folder / "scheduler/scheduler_config.json", scheduler)
    _write(folder / "unet/config.json", unet)
    _write(folder / "vae/config.json", vae)
    for name, (config, pad_token) in texts.items():
        _write(folder / name / "config.json", config)
        index[name] = ["transformers", config["architectures"][0]]
        tokenizer = name.replace("text_encoder", "tokenizer")
        write_clip_tokenizer(folder / tokenizer, pad_token=pad_token)
        index[tokenizer] = ["transformers", "CLIPTokenizer"]
    _write(folder / "model_index.json", index)


def _write(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")
