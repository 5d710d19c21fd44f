"""Tiny random torch models: what the networks of this repository must equal."""

import jax
import numpy as np
import torch


def random_params(params, seed=0):
    """Numbers for the shapes of a network (`abstract_model`), without a compilation."""
    rng = np.random.default_rng(seed)
    return jax.device_put(
        jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), params)
    )


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


_VQA_WORDS = (
    "is the there a red blue circle square yes no where above below left of right dark question"
    " choices answer what color ? : [ ] ' ,"
)


def blip2_folder(folder, seed=0, **changes):
    """Saves `tiny_blip2` as a whole transformers folder (with tokenizer) and returns the model."""
    import json
    from pathlib import Path

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = Path(folder)
    model = tiny_blip2(seed, **changes)
    model.save_pretrained(folder)
    words = ["<pad>", "</s>", "<unk>", *_VQA_WORDS.split()]
    vocab = {word: index for index, word in enumerate(words)} | {"<image>": 63}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
        "preprocessor_config.json": {
            "image_processor_type": "BlipImageProcessor",
            "do_resize": True,
            "size": {"height": 16, "width": 16},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
        },
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": 5},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return model


def transformers_answers(folder, images, texts, choices):
    """What transformers' own BLIP-2 processor and model answer, from a folder.

    Args:
        images: uint8 [b, h, w, 3]; texts: b prompts; choices: b lists of answers.

    Returns:
        (probabilities of each row's choices: the product over a choice's tokens, the end token
        included where any choice of the row has several, normalized; greedy texts).
    """
    from PIL import Image
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    processor = Blip2Processor.from_pretrained(folder)
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, start = processor.tokenizer, model.config.text_config.decoder_start_token_id
    probabilities, greedy = [], []
    for image, text, offered in zip(images, texts, choices, strict=True):
        inputs = processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in offered]
        if any(len(tokens) > 1 for tokens in ids):
            ids = [[*tokens, tokenizer.eos_token_id] for tokens in ids]
        totals = []
        with torch.no_grad():
            for tokens in ids:
                decoder_ids = torch.tensor([[start, *tokens[:-1]]])
                logits = model(**inputs, decoder_input_ids=decoder_ids).logits[0]
                log_probs = logits.log_softmax(-1)
                totals.append(log_probs[range(len(tokens)), tokens].sum())
            made = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=6)
        probabilities.append(torch.stack(totals).softmax(0).numpy())
        greedy.append(processor.batch_decode(made, skip_special_tokens=True)[0])
    return probabilities, greedy


def spread(model, seed=0):
    """Random weights of about unit gain, biases and norms too, so that no path is near zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim <= 1:
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(offset + 0.2 * torch.randn_like(value))
            elif "embedding" in name and value.ndim == 2:
                value.copy_(torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)
    return model.eval()


def relative_error(actual, expected):
    """Largest difference as a share of the largest expected value."""
    import numpy as np

    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert np.std(expected) > 1e-3, "the expected values hardly vary: the test would prove nothing"
    return np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()


def assert_same_gradients(grads, twin, prefix="", tolerance=1e-4):
    """Each of our gradients equals the .grad of the torch parameter with its checkpoint key.

    The error of a parameter is a share of the largest gradient in it.
    """
    import numpy as np
    from flax import nnx

    from agfsync_jax.weights.networks import checkpoint_key

    theirs = {prefix + name: value.grad for name, value in twin.named_parameters()}
    compared = 0
    largest = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for path, leaf in nnx.to_flat_state(grads):
        key, axes = checkpoint_key(path, leaf.ndim)
        if theirs[key] is None:  # not on the way to the output
            assert not np.any(np.asarray(leaf[...])), key
            continue
        ours, expected = np.asarray(leaf[...]), theirs[key].numpy()
        ours = ours.transpose(axes) if axes else ours
        # A gradient that is zero but for rounding (a key's bias under softmax) has no own scale.
        scale = max(np.abs(expected).max(), 1e-3 * largest)
        assert np.abs(ours - expected).max() <= tolerance * scale, key
        compared += 1
    assert compared > 5


def unit_gain(model, seed=0):
    """Random weights that keep activations of unit size through a network of any width.

    As `spread`, but by the kind of a layer and not by its name, and in place.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, torch.nn.Embedding):
                    value.normal_()
                elif value.ndim > 1:
                    value.normal_(std=value[0].numel() ** -0.5)
                else:
                    norm = "Norm" in type(module).__name__ and name == "weight"
                    value.normal_(mean=1.0 if norm else 0.0, std=0.2)
    return model.eval()


def tiny_stable_diffusion_xl(folder, seed=0, refiner=False):
    """Saves a tiny random Stable Diffusion XL of 32-pixel images to `folder`, and returns it.

    The refiner has the second text encoder alone, and is an image-to-image pipeline.
    """
    import json
    from pathlib import Path

    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    folder, words = Path(folder), ("red", "blue", "circle", "square")
    vocab = clip_tokenizer_files(folder / "tokenizer", words)
    clip_tokenizer_files(folder / "tokenizer_2", words)
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "x</w>"}))
    text = {
        "vocab_size": len(vocab),
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
    }
    torch.manual_seed(seed)
    first = CLIPTextModel(CLIPTextConfig(hidden_size=16, **text))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=24, projection_dim=20, hidden_act="gelu", **text)
    )
    ids = 5 if refiner else 6
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=24 if refiner else 40,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 8 * ids,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.13025,
    )
    with torch.no_grad():
        for encoder in (first, second):
            for name, value in encoder.named_parameters():
                if "embedding" in name:
                    value.copy_(torch.randn_like(value))  # so that prompts differ
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    tokenizers = [
        CLIPTokenizer.from_pretrained(str(folder / name)) for name in ("tokenizer", "tokenizer_2")
    ]
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder_2": second}
    if refiner:
        pipeline = StableDiffusionXLImg2ImgPipeline(
            **parts,
            text_encoder=None,
            tokenizer=None,
            tokenizer_2=tokenizers[1],
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder=first,
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(str(folder))
    return pipeline


def import_open_clip():
    """open_clip's networks and tokenizer, without torchvision and timm.

    A torchvision must be of torch's own build, which no requirement can say; open_clip wants it for
    images alone. Skips the test where open_clip is not installed (launch/test.sh installs it).
    """
    import importlib.machinery
    import sys
    import types

    import pytest
    from transformers import CLIPModel  # noqa: F401 - before it can see the stand-ins

    def anything(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    names = ["torchvision", "torchvision.ops", "torchvision.ops.misc"]
    names += ["torchvision.transforms", "torchvision.transforms.functional"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            module = types.ModuleType(name)
            module.__path__, module.__getattr__ = [], anything
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            patch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        modes = types.SimpleNamespace(BICUBIC="bicubic", BILINEAR="bilinear")
        sys.modules["torchvision.transforms"].InterpolationMode = modes
        patch.setitem(sys.modules, "timm", None)
        found = pytest.importorskip("open_clip", reason="launch/test.sh installs open_clip")
    for name in [name for name in sys.modules if name.split(".")[0] == "open_clip"]:
        del sys.modules[name]  # for whoever wants it whole
    return found
