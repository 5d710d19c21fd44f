"""Tiny twins of what the released configs load, each in the layout of the released files.

Configs are the released ones (tests/released.py) but for their sizes.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from agfsync_jax.data.images import encode_png
from tests.released import CHECKPOINTS
from tests.twins import clip_tokenizer_files, spread

WORDS = ("red", "blue", "circle", "square")
STABLE_DIFFUSION = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
_INDEX = {
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", ""],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
_INDEX_XL = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
_UNET = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
_UNET |= {"cross_attention_dim": 16, "sample_size": 8}
# Attention is in the middle: a program of fewer layers is compiled sooner.
_UNET |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
_SIZES = {
    "unet": {
        "sd14": {"attention_head_dim": 2},
        "sd15": {"attention_head_dim": 2},
        "sd21": {"attention_head_dim": [2]},
        "sdxl": {
            "addition_time_embed_dim": 8,
            "attention_head_dim": [2],
            "cross_attention_dim": 40,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "transformer_layers_per_block": [1],
        },
    },
    "vae": {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 16},
    "text_encoder_2": {"hidden_size": 24, "projection_dim": 24},
}
_TEXT = {"intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
_TEXT |= {"max_position_embeddings": 12}
# What latent consistency LoRAs adapt.
_ADAPTED = """to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2
conv_shortcut time_emb_proj""".split()


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def _save(path, part, config, seed, names=lambda name: name):
    """Weights of a part with this config, and the config itself; the torch module."""
    network = spread(part._replace(config=config).twin(), seed)
    _write(path.parent / "config.json", config)
    tensors = {names(name): value.contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, {"format": "pt"})
    return network


def stable_diffusion(folder, name):
    """A diffusers folder of the checkpoint of configs/NAME.py; the torch UNet."""
    parts = CHECKPOINTS[STABLE_DIFFUSION[name]]
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", **_INDEX}
    if name == "sdxl":
        index |= _INDEX_XL
        del index["feature_extractor"], index["safety_checker"]
    scheduler = parts["scheduler"].config
    _write(folder / "scheduler/scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write(folder / "model_index.json", index)
    for each in [each for each in index if each.startswith("tokenizer")]:
        vocab = clip_tokenizer_files(folder / each, WORDS)
    for each in [each for each in index if each.startswith("text_encoder")]:
        config = parts[each].config | _TEXT | _SIZES[each] | {"vocab_size": len(vocab)}
        file = folder / each / "model.safetensors"

        def names(name):  # as transformers before 5 wrote them
            bare = not name.startswith(("text_model.", "text_projection."))
            return f"text_model.{name}" if bare else name

        _save(file, parts[each], config, 1, names)
    config = parts["vae"].config | _SIZES["vae"]
    config |= {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    _save(folder / "vae/diffusion_pytorch_model.safetensors", parts["vae"], config, 2)
    config = parts["unet"].config | _UNET | _SIZES["unet"][name]
    return _save(folder / "unet/diffusion_pytorch_model.safetensors", parts["unet"], config, 3)


def lcm_lora(folder, unet):
    """As latent-consistency/lcm-lora-*: kohya's keys, float16."""
    torch.manual_seed(4)
    tensors = {}
    for name, module in unet.named_modules():
        if not name.endswith(tuple(f".{each}" for each in _ADAPTED)):
            continue
        rows, columns, *kernel = module.weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = torch.randn(4, columns, *kernel), torch.randn(rows, 4, *[1] * len(kernel))
        tensors[f"{key}.lora_down.weight"] = (0.1 * down).half()
        tensors[f"{key}.lora_up.weight"] = (0.1 * up).half()
        tensors[f"{key}.alpha"] = torch.tensor(2.0).half()
    assert len(tensors) > 20
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def clip(folder):
    """openai/clip-vit-large-patch14."""
    part = CHECKPOINTS["openai/clip-vit-large-patch14"]["clip"]
    vocab = clip_tokenizer_files(folder, WORDS)
    small = {"text": _TEXT | {"hidden_size": 16, "vocab_size": len(vocab)}}
    small["vision"] = {"hidden_size": 16, "image_size": 8, "patch_size": 4} | {
        each: _TEXT[each] for each in _TEXT if each != "max_position_embeddings"
    }
    config = part.config | {"projection_dim": 12}
    for tower, sizes in small.items():
        for block in (f"{tower}_config", f"{tower}_config_dict"):
            config[block] = config[block] | sizes | {"projection_dim": 12}
    _save(folder / "model.safetensors", part, config, 5)
    _write(
        folder / "preprocessor_config.json",
        {
            "crop_size": 8,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": 8,
        },
    )


def aesthetic_head(path, width=12):
    """LAION's sac+logos+ava1-l14-linearMSE.pth, for embeddings of `width` numbers."""
    torch.manual_seed(6)
    sizes, layers = [width, 1024, 128, 64, 16, 1], [0, 2, 4, 6, 7]
    tensors = {}
    for layer, columns, rows in zip(layers, sizes[:-1], sizes[1:], strict=True):
        tensors[f"layers.{layer}.weight"] = torch.randn(rows, columns) * columns**-0.5
        tensors[f"layers.{layer}.bias"] = 0.1 * torch.randn(rows)
    torch.save(tensors, path)


def user_files(folder):
    """prompts.jsonl and heldout.jsonl with their questions.jsonl, as users write them."""
    rows = {
        "prompts": [{"prompt": "a red circle"}, {"prompt": "a blue square above a circle"}],
        "heldout": [{"prompt": f"{number} red squares"} for number in range(2, 10)],
    }
    rows["questions"] = [
        {"caption": row["prompt"], "question": f"is there a {word}?", "answer": "yes"}
        for row in rows["prompts"] + rows["heldout"]
        for word in (*WORDS, "question")
    ]
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (Path(folder) / f"{name}.jsonl").write_text(text)


def people(path, count=5):
    """A Pick-a-Pic of 8-pixel images: each of its choices is for the darker one."""
    rng = np.random.default_rng(7)
    rows = {"caption": [], "jpg_0": [], "jpg_1": [], "label_0": []}
    for number in range(count):
        first_is_darker = number % 2
        for side in range(2):
            top = 100 if first_is_darker == (side == 0) else 256
            image = rng.integers(top - 100, top, (8, 8, 3)).astype(np.uint8)
            rows[f"jpg_{side}"].append({"bytes": encode_png(image)})
        rows["caption"].append(f"a red circle and {number} squares")
        rows["label_0"].append(float(first_is_darker))
    pq.write_table(pa.table(rows), path)
