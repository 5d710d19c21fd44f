"""The Hugging Face folders of the micro suite: its sizes, configs and tokenizers."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
from flax import nnx

from agfsync_jax.data.tokenizers import ClipTokenizer, TextTokenizer
from agfsync_jax.micro.questions import VOCABULARY
from agfsync_jax.models.clip import CLIPTextModel
from agfsync_jax.weights import networks as weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LENGTH = 20  # tokens of a caption; the longest of the grammar has 16
NUM_QUERY_TOKENS = 12
QUESTION_LENGTH = 16  # tokens of a question; the longest of the world has 13
LATENT_SHAPE = (16, 16, 4)
# The files hold float16; without this, transformers would compute in it too.
COMPUTE_DTYPE = "float32"
_DIFFUSERS = {"_diffusers_version": "0.42.1"}

VAE = _DIFFUSERS | {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET = _DIFFUSERS | {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [32, 64, 128],
    "cross_attention_dim": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = _DIFFUSERS | {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def clip_config(tokenizer: ClipTokenizer) -> dict:
    """config.json of the CLIPModel."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    }
    ends = {"bos_token_id": tokenizer.eos_id - 1, "eos_token_id": tokenizer.eos_id}
    return {
        "architectures": ["CLIPModel"],
        "dtype": COMPUTE_DTYPE,
        "model_type": "clip",
        "projection_dim": 128,
        "logit_scale_init_value": 2.6592,
        "text_config": sizes
        | ends
        | {
            "model_type": "clip_text_model",
            "max_position_embeddings": MAX_LENGTH,
            "num_hidden_layers": 3,
            "pad_token_id": tokenizer.pad_id,
            "vocab_size": tokenizer.vocab_size,
        },
        "vision_config": sizes
        | {
            "model_type": "clip_vision_model",
            "image_size": 64,
            "num_channels": 3,
            "num_hidden_layers": 4,
            "patch_size": 8,
        },
    }


def write_json(path: Path, value: dict) -> None:
    """Writes one JSON file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def byte_pair_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until each word is one token: the most frequent pair
    first and, of equals, the last in the alphabet, so that two runs give the same token ids."""
    spelled = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while pairs := Counter(pair for parts in spelled.values() for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merge(parts, best) for word, parts in spelled.items()}
    return merges


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        # A piece that was just merged is longer than the pair's first, so it cannot merge again.
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def write_tokenizer(folder: Path) -> None:
    """A CLIP byte-pair tokenizer in which every word of the world is one token.

    Any other text falls apart into its bytes, as in the tokenizer of the real CLIP.
    """
    from tokenizers import pre_tokenizers

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = bytes_ + [token + "</w>" for token in bytes_]
    merges = byte_pair_merges(VOCABULARY)
    words = list(dict.fromkeys("".join(pair) for pair in merges))
    vocabulary = [*alphabet, *words, "<|startoftext|>", "<|endoftext|>"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    special = {"bos_token": "<|startoftext|>"} | {
        name: "<|endoftext|>" for name in ("eos_token", "pad_token", "unk_token")
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "model_max_length": MAX_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
            "do_lower_case": True,
        },
    )


def write_preprocessor(folder: Path, kind: str) -> None:
    """How images are made for CLIP or BLIP-2; `kind` is the class that transformers has for it."""
    size = {"height": 64, "width": 64}
    crop = {"do_center_crop": True, "crop_size": size} if kind == "CLIPImageProcessor" else {}
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(CLIP_MEAN),
            "image_processor_type": kind,
            "image_std": list(CLIP_STD),
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": 64} if crop else size,
        }
        | crop,
    )


def write_text_encoder(folder: Path, clip: nnx.State, config: dict) -> None:
    """The text tower of `clip` as Stable Diffusion's text_encoder/ and tokenizer/."""
    text = nnx.State({"text_model": clip["text_model"]})
    written = {"architectures": ["CLIPTextModel"], "dtype": COMPUTE_DTYPE} | config["text_config"]
    weights.save_model(CLIPTextModel, folder / "text_encoder", text, written, dtype=np.float16)
    write_tokenizer(folder / "tokenizer")


def write_pipeline(folder: Path) -> None:
    """model_index.json and the scheduler of a StableDiffusionPipeline."""
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(
        folder / "model_index.json",
        _DIFFUSERS
        | {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def write_blip2_tokenizer(folder: Path) -> None:
    """A T5 tokenizer (Unigram) in which every word of the world is one token; others fall apart
    into letters. "<image>" is where transformers' processor puts the image tokens."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [("▁" + word, -1.0) for word in VOCABULARY]
    pieces += [(character, -8.0) for character in map(chr, range(33, 127))]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    write_preprocessor(folder, "BlipImageProcessor")
    write_json(
        folder / "processor_config.json",
        {"num_query_tokens": NUM_QUERY_TOKENS, "processor_class": "Blip2Processor"},
    )


def blip2_config(tokenizer: TextTokenizer) -> dict:
    """config.json of the Blip2ForConditionalGeneration."""
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "dtype": COMPUTE_DTYPE,
        "model_type": "blip-2",
        "image_token_index": tokenizer.token_id("<image>"),
        "num_query_tokens": NUM_QUERY_TOKENS,
        "use_decoder_only_language_model": False,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": 128,
            "image_size": 64,
            "intermediate_size": 512,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": 8,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "cross_attention_frequency": 1,
            "encoder_hidden_size": 128,
            "hidden_act": "gelu_new",
            "hidden_size": 128,
            "intermediate_size": 256,
            "layer_norm_eps": 1e-12,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        "text_config": {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": 192,
            "d_kv": 24,
            "d_model": 96,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-6,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_layers": 3,
            "pad_token_id": 0,
            "relative_attention_max_distance": 64,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "vocab_size": tokenizer.vocab_size,
        },
    }
