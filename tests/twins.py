"""Tiny random torch models: what the networks of this repository must equal."""

import torch


def tiny_t5(seed=0, **changes):
    """A tiny random T5 of transformers, classic by default (ReLU, head tied to the table)."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        # transformers' generate fails with more decoder than encoder layers
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**{**sizes, **changes})).eval()
    return _spread_t5(model)


def _spread_t5(model):
    """Trains nothing, only makes norms and the head far from their initial values."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.copy_(1 + 0.3 * torch.randn_like(value))
            elif "relative_attention_bias" in name:
                value.copy_(torch.randn_like(value))
            elif ".q." in name:
                value.mul_(4)
            elif "EncDecAttention.o" in name:  # or the tied head only repeats its last token
                value.mul_(8)
    return model


def tiny_blip2(seed=0, text=None, **changes):
    """A tiny random BLIP-2 of transformers with a T5 of `text` changes, 16-pixel images."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text_model = tiny_t5(seed, **(text or {}))
    config = Blip2Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 16,
            "patch_size": 4,
        },
        qformer_config={
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 40,
        },
        text_config=text_model.config,
        **{"num_query_tokens": 5, "image_token_index": 63, **changes},
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("language_model"):
                continue
            if "norm" in name.lower() and name.endswith("weight"):
                value.copy_(1 + 0.3 * torch.randn_like(value))
            elif value.ndim == 1:
                value.copy_(0.3 * torch.randn_like(value))
            elif "embedding" in name and value.ndim == 3 or "query_tokens" in name:
                value.copy_(torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)
    model.language_model.load_state_dict(text_model.state_dict())
    return model


def clip_tokenizer_files(folder, words=(), length=12):
    """Writes a CLIP tokenizer of single letters and whole `words`, `length` tokens a text."""
    import json
    import string
    from pathlib import Path

    folder = Path(folder)
    folder.mkdir(parents=True)
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    merges = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
    pieces += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return vocab


def tiny_stable_diffusion(folder, seed=0, **scheduler):
    """Saves a tiny random StableDiffusionPipeline of 32-pixel images to `folder`, and returns it.

    `scheduler` changes fields of its DDIM scheduler.
    """
    from pathlib import Path

    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vocab = clip_tokenizer_files(Path(folder) / "tokenizer", ("red", "blue", "circle", "square"))
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
            pad_token_id=vocab["<|endoftext|>"],
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    with torch.no_grad():
        for name, value in text_encoder.named_parameters():
            if "embedding" in name:
                value.copy_(torch.randn_like(value))  # so that prompts differ
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(str(Path(folder) / "tokenizer")),
        unet=unet,
        scheduler=DDIMScheduler(
            **{
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
                **scheduler,
            }
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder))
    return pipeline
