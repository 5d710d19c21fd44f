"""The config.json files of the released checkpoints that load here, as they lie on the hub.

`CHECKPOINTS` is name -> part -> `Part`; a part of two spellings, as old and new versions of
diffusers or transformers write it, stands there twice. Schedulers have no network and so no class
of ours.
"""

import importlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionTransformer,
)
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL


class Part(NamedTuple):
    ours: type | None
    theirs: str  # dotted, such as diffusers.AutoencoderKL
    config: dict[str, Any]
    parameters: int | None = None  # as published

    def twin(self) -> Any:
        """The torch module, with its own initial weights; under `torch.device("meta")` with none.

        A scheduler for a scheduler's part.
        """
        package, name = self.theirs.split(".")
        cls = getattr(importlib.import_module(package), name)
        if package == "diffusers":
            return cls.from_config(self.config)
        return cls(cls.config_class.from_dict(self.config))


class VisionTower(nnx.Module):
    """CLIP's vision tower alone, which nothing but tests reads."""

    config_class = CLIPVisionConfig
    key_aliases = ((r"^(?!vision_model\.)", "vision_model."),)
    ignored_keys = (r"vision_model\.embeddings\.position_ids",)

    def __init__(self, config, *, rngs, dtype=jnp.float32):
        self.vision_model = CLIPVisionTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(self, pixel_values):
        return self.vision_model(pixel_values)


def _unet(parameters, **config):
    config = {"_class_name": "UNet2DConditionModel", **config}
    return Part(UNet2DConditionModel, "diffusers.UNet2DConditionModel", config, parameters)


def _vae(**config):
    config = {"_class_name": "AutoencoderKL", **_VAE, **config}
    return Part(AutoencoderKL, "diffusers.AutoencoderKL", config, 83_653_863)


def _text(parameters, ours=CLIPTextModel, **config):
    config = {"architectures": [ours.__name__], **_TEXT, **config}
    return Part(ours, f"transformers.{ours.__name__}", config, parameters)


def _clip(parameters, projection_dim, text, vision, **config):
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection_dim,
        "text_config": {"model_type": "clip_text_model"} | text,
        "vision_config": {"model_type": "clip_vision_model"} | vision,
        **config,
    }
    return Part(CLIPModel, "transformers.CLIPModel", config, parameters)


def _old_clip(parameters, projection_dim, text, vision, repeated=True):
    """As transformers 4.16 wrote it: each nested config in full, and its changes once more."""
    changes = {"text_config_dict": text or None, "vision_config_dict": vision or None}
    text = {"projection_dim": 512, **_BASE_TEXT, **text}
    vision = {"projection_dim": 512, **_BASE_VISION, **vision}
    nested = {"text_config": _LEGACY | text, "vision_config": _LEGACY | vision}
    written = {"torch_dtype": "float32", "transformers_version": None}
    config = written | (changes if repeated else {})
    text, vision = nested.values()
    return _clip(parameters, projection_dim, text, vision, **config)


def _scheduler(name, **config):
    config = {
        "_class_name": name,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
        **config,
    }
    return Part(None, f"diffusers.{name}", config)


def _blip2(old=True, **text):
    text = {
        "bos_token_id": 1,
        "dense_act_fn": "gelu",
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "num_decoder_layers": 24,
        "num_layers": 24,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
        **text,
    }
    vision = {"model_type": "blip_2_vision_model"}
    qformer = {"model_type": "blip_2_qformer"}
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": 32,
        "image_token_index": 32100,
        "use_decoder_only_language_model": False,
    }
    if old:
        nested = _LEGACY | {"is_encoder_decoder": True, "task_specific_params": _T5_TASKS}
        text = nested | text | {"decoder_start_token_id": 0, "tie_word_embeddings": False}
        text |= {"eos_token_id": 1, "n_positions": 512, "output_past": True, "pad_token_id": 0}
        vision = _LEGACY | vision | _BLIP2_VISION
        qformer = _LEGACY | qformer | _BLIP2_QFORMER
        config |= {"is_encoder_decoder": True, "tie_word_embeddings": False}
        config |= {"torch_dtype": "float32", "transformers_version": None}
    else:
        text |= {"scale_decoder_outputs": False, "tie_word_embeddings": True}
        text |= {"classifier_dropout": 0.0, "is_decoder": False, "use_cache": True}
        text |= {"eos_token_id": 1, "pad_token_id": 0, "dtype": "float32"}
        vision |= {"dropout": 0.0, "initializer_factor": 1.0, "num_channels": 3}
        vision |= {"projection_dim": 512}
        qformer |= {"classifier_dropout": None, "use_qformer_text_input": False}
        config |= {"image_text_hidden_size": 256}
        config |= {"dtype": "float32", "transformers_version": "5.0.0"}
    config |= {"text_config": text, "vision_config": vision, "qformer_config": qformer}
    name = "transformers.Blip2ForConditionalGeneration"
    return Part(Blip2ForConditionalGeneration, name, config)


# What transformers 4 wrote into every nested config.
_LEGACY = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.27.0.dev0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}

# diffusers 0.2, of Stable Diffusion 1.4
_UNET_SD1 = {
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
# The fields that came later, as diffusers 0.24 and newer write them where a model does not use them
_UNET_NEW = {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
    "use_linear_projection": False,
}
_UNET_SD2 = _UNET_SD1 | {
    "_diffusers_version": "0.8.0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
_UNET_SD21 = _UNET_SD2 | {
    "_diffusers_version": "0.10.0.dev0",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": True,
}
_UNET_SDXL = (
    _UNET_SD1
    | {name: _UNET_NEW[name] for name in _UNET_NEW if name not in ("attention_type", "dropout")}
    | {
        "_diffusers_version": "0.19.0.dev0",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "use_linear_projection": True,
    }
)
_UNET_REFINER = _UNET_SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
}

_VAE = {
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_NEW = {
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_SDXL = {
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}

# The text encoder of Stable Diffusion 1: CLIP ViT-L/14's
_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
_TEXT_L = {"projection_dim": 768, "transformers_version": "4.32.0.dev0"}
_TEXT_H = {  # the last layer of OpenCLIP ViT-H/14 is left out
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "transformers_version": "4.25.0.dev0",
}
_TEXT_BIG_G = {
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "transformers_version": "4.32.0.dev0",
}
_TEXT_COUNT = {"L": 123_060_480, "H": 340_387_840, "bigG": 694_659_840}

_BASE_TEXT = {name: value for name, value in _TEXT.items() if "transformers" not in name} | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
}
_BASE_VISION = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "image_size": 224,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 32,
}


def _sizes(width, layers, heads, **more):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return sizes | {"num_attention_heads": heads, "num_hidden_layers": layers} | more


_GELU = {"hidden_act": "gelu"}
_L_TEXT = _sizes(768, 12, 12, projection_dim=768)
_L_VISION = _sizes(1024, 24, 16, patch_size=14, projection_dim=768)
_H_TEXT = _sizes(1024, 24, 16) | _GELU
_H_VISION = _sizes(1280, 32, 16, patch_size=14) | _GELU
_G_TEXT = _sizes(1280, 32, 20) | _GELU
_G_VISION = _sizes(1664, 48, 16, patch_size=14) | _GELU | {"intermediate_size": 8192}

_BLIP2_VISION = {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 224,
    "initializer_factor": 1.0,
    "initializer_range": 1e-10,
    "intermediate_size": 6144,
    "layer_norm_eps": 1e-06,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 39,
    "patch_size": 14,
    "projection_dim": 512,
    "qkv_bias": True,
}
_BLIP2_QFORMER = {
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "vocab_size": 30522,
}
_T5_TASKS = {"summarization": {"early_stopping": True, "num_beams": 4, "prefix": "summarize: "}}
_T5_XL = {"d_ff": 5120, "d_kv": 64, "d_model": 2048, "num_heads": 32}
_T5_XXL = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "num_heads": 64}

_EULER = {
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
_TURBO = _EULER | {
    "rescale_betas_zero_snr": False,
    "sigma_max": None,
    "sigma_min": None,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
}
_SD1_COUNT, _SD2_COUNT, _SDXL_COUNT = 859_520_964, 865_910_724, 2_567_463_684

CHECKPOINTS: dict[str, dict[str, Part]] = {
    "CompVis/stable-diffusion-v1-4": {
        "unet": _unet(_SD1_COUNT, **_UNET_SD1),
        "vae": _vae(),
        "text_encoder": _text(_TEXT_COUNT["L"]),
        "scheduler": _scheduler("PNDMScheduler", _diffusers_version="0.7.0.dev0"),
    },
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {
        "unet": _unet(_SD1_COUNT, **_UNET_SD1 | {"_diffusers_version": "0.6.0"}),
        "unet, saved again": _unet(
            _SD1_COUNT,
            **_UNET_SD1 | _UNET_NEW | {"_diffusers_version": "0.42.1", "_name_or_path": "unet"},
        ),
        "vae": _vae(_diffusers_version="0.6.0", norm_num_groups=32),
        "vae, saved again": _vae(**_VAE_NEW | {"_diffusers_version": "0.42.1"}),
        "text_encoder": _text(_TEXT_COUNT["L"], _name_or_path="openai/clip-vit-large-patch14"),
        "text_encoder, saved again": _text(
            _TEXT_COUNT["L"], projection_dim=512, dtype="float32", transformers_version="5.0.0"
        ),
        "scheduler": _scheduler("PNDMScheduler", _diffusers_version="0.6.0"),
    },
    "stabilityai/stable-diffusion-2-base": {
        "unet": _unet(_SD2_COUNT, **_UNET_SD2),
        "vae": _vae(_diffusers_version="0.8.0", norm_num_groups=32),
        "text_encoder": _text(_TEXT_COUNT["H"], **_TEXT_H),
        "scheduler": _scheduler("PNDMScheduler", _diffusers_version="0.8.0"),
    },
    "stabilityai/stable-diffusion-2-1-base": {
        "unet": _unet(_SD2_COUNT, **_UNET_SD21 | {"upcast_attention": False}),
        "vae": _vae(_diffusers_version="0.10.0.dev0", norm_num_groups=32),
        "text_encoder": _text(_TEXT_COUNT["H"], **_TEXT_H),
        "scheduler": _scheduler("PNDMScheduler", prediction_type="epsilon"),
    },
    "stabilityai/stable-diffusion-2-1": {
        "unet": _unet(_SD2_COUNT, **_UNET_SD21 | {"sample_size": 96}),
        "vae": _vae(_diffusers_version="0.10.0.dev0", norm_num_groups=32, sample_size=768),
        "text_encoder": _text(_TEXT_COUNT["H"], **_TEXT_H),
        "scheduler": _scheduler("DDIMScheduler", prediction_type="v_prediction"),
    },
    "stabilityai/sd-turbo": {
        "unet": _unet(
            _SD2_COUNT,
            **_UNET_SD2
            | _UNET_NEW
            | {"_diffusers_version": "0.24.0.dev0", "use_linear_projection": True},
        ),
        "vae": _vae(
            _diffusers_version="0.24.0.dev0",
            force_upcast=True,
            norm_num_groups=32,
            sample_size=768,
            scaling_factor=0.18215,
        ),
        "text_encoder": _text(_TEXT_COUNT["H"], **_TEXT_H),
        "scheduler": _scheduler("EulerDiscreteScheduler", **_TURBO),
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": _unet(_SDXL_COUNT, **_UNET_SDXL),
        "vae": _vae(**_VAE_SDXL),
        "text_encoder": _text(_TEXT_COUNT["L"], **_TEXT_L),
        "text_encoder_2": _text(_TEXT_COUNT["bigG"], CLIPTextModelWithProjection, **_TEXT_BIG_G),
        "scheduler": _scheduler("EulerDiscreteScheduler", **_EULER),
    },
    "stabilityai/stable-diffusion-xl-refiner-1.0": {
        "unet": _unet(None, **_UNET_REFINER),
        "vae": _vae(**_VAE_SDXL),
        "text_encoder_2": _text(_TEXT_COUNT["bigG"], CLIPTextModelWithProjection, **_TEXT_BIG_G),
        "scheduler": _scheduler("EulerDiscreteScheduler", **_EULER),
    },
    "stabilityai/sdxl-turbo": {
        "unet": _unet(
            _SDXL_COUNT,
            **_UNET_NEW | _UNET_SDXL | {"_diffusers_version": "0.24.0.dev0", "sample_size": 64},
        ),
        "vae": _vae(**_VAE_NEW | _VAE_SDXL | {"_diffusers_version": "0.24.0.dev0"}),
        "text_encoder": _text(_TEXT_COUNT["L"], **_TEXT_L),
        "text_encoder_2": _text(_TEXT_COUNT["bigG"], CLIPTextModelWithProjection, **_TEXT_BIG_G),
        "scheduler": _scheduler("EulerAncestralDiscreteScheduler", **_TURBO),
    },
    "openai/clip-vit-base-patch32": {
        "clip": _old_clip(151_277_313, 512, {}, {}),
        "clip, saved again": _clip(151_277_313, 512, {"eos_token_id": 2}, {}, dtype="float32"),
    },
    "openai/clip-vit-base-patch16": {
        "clip": _old_clip(149_620_737, 512, {}, {"patch_size": 16}),
    },
    "openai/clip-vit-large-patch14": {
        "clip": _old_clip(427_616_513, 768, _L_TEXT, _L_VISION),
        "clip, saved again": _clip(427_616_513, 768, _L_TEXT, _L_VISION),
    },
    "openai/clip-vit-large-patch14-336": {
        "clip": _old_clip(427_944_193, 768, _L_TEXT, _L_VISION | {"image_size": 336}),
    },
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": {
        "clip": _old_clip(986_109_441, 1024, _H_TEXT, _H_VISION),
    },
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": {
        "clip": _old_clip(None, 1280, _G_TEXT, _G_VISION),
    },
    "yuvalkirstain/PickScore_v1": {
        "clip": _old_clip(986_109_441, 1024, _H_TEXT, _H_VISION, repeated=False),
    },
    "Salesforce/blip2-flan-t5-xl": {
        "blip2": _blip2(**_T5_XL),
        "blip2, saved again": _blip2(old=False, **_T5_XL),
    },
    "Salesforce/blip2-flan-t5-xxl": {
        "blip2": _blip2(**_T5_XXL),
        "blip2, saved again": _blip2(old=False, **_T5_XXL),
    },
}
NETWORKS = {
    f"{name}: {part}": each
    for name, parts in CHECKPOINTS.items()
    for part, each in parts.items()
    if each.ours is not None
}
