"""Single files of CompVis and Stability AI, renamed to diffusers' and transformers' keys.

Such a file (of latent-diffusion, or generative-models) holds UNet, autoencoder and text encoders
together. Functions here take and give dictionaries of `Tensor`s and read none of them; shapes that
differ are for `weights.fit` to tell.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping

from agfsync_jax.weights.open_clip import rename_open_clip
from agfsync_jax.weights.tensor_files import Tensor

Tensors = dict[str, Tensor]

# Parts of a single file: layout -> (regex of the keys' prefix, what it is for messages).
_PARTS = {
    "unet": (r"model\.diffusion_model\.", "the UNet (model.diffusion_model.*)"),
    "vae": (r"first_stage_model\.", "the autoencoder (first_stage_model.*)"),
    "clip": (
        r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.",
        "the text encoder CLIP ViT-L "
        "(cond_stage_model.transformer.* or conditioner.embedders.0.transformer.*)",
    ),
    "open_clip": (
        r"(?:cond_stage_model|conditioner\.embedders\.[01])\.model\.",
        "the text encoder of OpenCLIP "
        "(cond_stage_model.model.* or conditioner.embedders.*.model.*)",
    ),
}
# Family -> (its text encoders: layout -> part of the diffusers folder, its kinds). Files of several
# kinds have the same keys and differ in the noise schedule; the first is meant unless told, but for
# Stable Diffusion 2, of which none is usual.
_FAMILIES = {
    "Stable Diffusion 1": ({"clip": "text_encoder"}, ("stable-diffusion-v1-5",)),
    "Stable Diffusion 2": (
        {"open_clip": "text_encoder"},
        ("stable-diffusion-2", "stable-diffusion-2-base", "sd-turbo"),
    ),
    "Stable Diffusion XL": (
        {"clip": "text_encoder", "open_clip": "text_encoder_2"},
        ("stable-diffusion-xl-base", "sdxl-turbo"),
    ),
    "the refiner of Stable Diffusion XL": (
        {"open_clip": "text_encoder_2"},
        ("stable-diffusion-xl-refiner",),
    ),
}
# Of 24 layers of its text tower Stable Diffusion 2 reads what goes into the last one.
_SD2_UNUSED = r"text_model\.encoder\.layers\.23\.|text_projection\."
# Keys of single files that hold no parameter of a part.
_IGNORED = (
    r"model_ema\..*",  # the running average; `model.` holds what the file is meant to be used with
    # the noise schedule, which the kind says: of latent-diffusion, then of generative-models
    r"betas|((sqrt|log)_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?",
    r"posterior_(variance|log_variance_clipped|mean_coef\d)|lvlb_weights|logvar|scale_factor",
    r"denoiser\.(sigmas|log_sigmas)",
    r"first_stage_model\.(loss|model_ema)\..*",  # the discriminator of the autoencoder's training
    # what is a constant, or of CLIP's and not of a text encoder
    r".*\.position_ids",
    r"(cond_stage_model|conditioner\.embedders\.[01])\.(model\.)?(logit_scale|attn_mask)",
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight",
)
# What other files are known by.
_OTHERS = (
    (r"(lora_|.*(\.lora[._]|_lora\.|\.lora_[AB]\.|\.hada_w\d|\.lokr_w\d))", "weights of a LoRA"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?(double_blocks|single_blocks)\.", "a Flux"),
    (r"model\.diffusion_model\..*\.time_(stack|mixer)", "a Stable Video Diffusion"),
    (r"(control_model|controlnet_\w+|input_hint_block)\.", "a ControlNet"),
    (r".*motion_modules\.", "a motion module of AnimateDiff"),
    (r"(noise_augmentor|embedder)\.", "a Stable unCLIP"),
    (r"edm_(mean|std)$", "a Playground 2.5"),
    (r"edm_vpred\.", "a CosXL"),
    (r"(v_pred|ztsnr)$", "a Stable Diffusion XL of v-prediction"),
    (r"(emb_params|string_to_param|clip_[lg])$", "an embedding of textual inversion"),
    (r"(down_blocks|up_blocks|mid_block|encoder\.down_blocks)\.", "one network in diffusers' keys"),
    (r"(text_model|vision_model)\.", "a CLIP in transformers' keys"),
    (r"(module\.)?visual\.", "a CLIP"),
    (r"(encoder|decoder)\.(mid|up|down)\.", "an autoencoder alone"),
)
_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an image-editing", 9: "an inpainting"}


def split_single_file(
    tensors: Mapping[str, Tensor], kind: str | None = None
) -> tuple[str, dict[str, Tensors]]:
    """Takes a single-file checkpoint of Stable Diffusion 1, 2 or XL apart.

    Args:
      tensors: by the file's keys; the running average under `model_ema.` is not used.
      kind: which model it is, one of `skeletons.KINDS`; needed where the file does not tell.

    Returns:
      (kind, {"unet", "vae", "text_encoder" and / or "text_encoder_2": tensors by the keys that
      diffusers and transformers write}).

    Raises:
      ValueError: it is another kind of file, lacks parts or holds more, or is a Stable Diffusion 2
        and `kind` is not given: its files do not say whether they predict noise or velocity.
    """
    for pattern, what in _OTHERS:
        if key := next((key for key in tensors if re.match(pattern, key)), None):
            raise ValueError(
                "Expected a single-file checkpoint of Stable Diffusion 1, 2 or XL; this seems to "
                f"be {what}: it holds {key}."
            )
    found, unknown = {name: {} for name in _PARTS}, []
    for key, tensor in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in _IGNORED):
            continue
        for name, (pattern, _) in _PARTS.items():
            if match := re.match(pattern, key):
                found[name][key[match.end() :]] = tensor
                break
        else:
            unknown.append(key)
    family = _family(tensors, found)
    encoders, kinds = _FAMILIES[family]
    needed = ("unet", "vae", *encoders)
    problems = [f"it lacks {_PARTS[name][1]}" for name in needed if not found[name]]
    if unknown:
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        problems.append(f"it holds {len(unknown)} unknown keys: {', '.join(unknown[:10])}{more}")
    channels = tensors[_INPUT].shape[1] if _INPUT in tensors else 4
    if channels != 4:
        what = _CHANNELS.get(channels, "another")
        problems.append(f"its UNet takes {channels} channels, not 4: it is of {what} model")
    if problems:
        listed = "; ".join(problems)
        raise ValueError(
            f"This is no single-file checkpoint of {family} for text to image: {listed}."
        )
    if kind is None and family == "Stable Diffusion 2":
        raise ValueError(
            "This is a single-file checkpoint of a Stable Diffusion 2, and such files do not say "
            f"of which. Set kind: {kinds[0]!r} predicts velocity (768 pixels), {kinds[1]!r} "
            f"predicts noise (512 pixels), {kinds[2]!r} does so in one to four steps."
        )
    if kind is not None and kind not in kinds:
        raise ValueError(
            f"kind={kind!r}, but this single file is of {family}: expected {' or '.join(kinds)}."
        )
    parts = {"unet": _unet(found["unet"]), "vae": _vae(found["vae"])}
    for name, part in encoders.items():
        if name == "clip":  # some merged files leave transformers' prefix out
            prefix = r"^(?!text_model\.)"
            parts[part] = {re.sub(prefix, "text_model.", k): t for k, t in found[name].items()}
        else:  # what is not known stays as it is, so that loading reports it
            renamed, unknown = rename_open_clip(found[name])
            parts[part] = renamed | {key: found[name][key] for key in unknown}
    if family == "Stable Diffusion 2":
        text = parts["text_encoder"]
        parts["text_encoder"] = {k: text[k] for k in text if not re.match(_SD2_UNUSED, k)}
    return kind or kinds[0], parts


def _family(tensors: Mapping[str, Tensor], found: dict[str, Tensors]) -> str:
    """Only XL adds pooled text to the timestep (label_emb); the text encoders tell the rest.

    Stable Diffusion 2's lies under `conditioner.embedders.0.model.` too, as the refiner's, in files
    that generative-models wrote.
    """
    extra = any(key.startswith("label_emb.") for key in found["unet"])
    if any(key.startswith("conditioner.embedders.1.") for key in tensors):
        return "Stable Diffusion XL"
    if found["open_clip"] and not found["clip"]:
        return "the refiner of Stable Diffusion XL" if extra else "Stable Diffusion 2"
    return "Stable Diffusion XL" if extra else "Stable Diffusion 1"


# latent-diffusion's UNet: https://github.com/CompVis/latent-diffusion,
# ldm/modules/diffusionmodules/openaimodel.py. Attention has diffusers' names already.
_UNET_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.1": "mid_block.attentions.0",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MAX_LEVELS = 8  # released UNets have 3 or 4


@functools.cache
def _unet_table(layers_per_block: int) -> dict[str, str]:
    """Module in latent-diffusion's layout, with underscores for dots -> in diffusers'.

    latent-diffusion numbers the blocks of all levels in one row: `layers_per_block` and a
    downsampler a level going down, one layer more going up. The upsampler comes last in its block:
    `output_blocks.N.1.conv` in a level without attention, `output_blocks.N.2.conv` in one with.
    """
    table = dict(_UNET_NAMES)
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level, layer in itertools.product(range(_MAX_LEVELS), range(layers_per_block + 1)):
        number = level * (layers_per_block + 1) + layer
        down, up = f"input_blocks.{number + 1}", f"output_blocks.{number}"
        resnets[f"{up}.0"] = f"up_blocks.{level}.resnets.{layer}"
        table[f"{up}.1"] = f"up_blocks.{level}.attentions.{layer}"
        table[f"{up}.1.conv"] = table[f"{up}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
        if layer < layers_per_block:
            resnets[f"{down}.0"] = f"down_blocks.{level}.resnets.{layer}"
            table[f"{down}.1"] = f"down_blocks.{level}.attentions.{layer}"
        else:
            table[f"{down}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for (old, new), (part, name) in itertools.product(resnets.items(), _RESNET_NAMES.items()):
        table[f"{old}.{part}"] = f"{new}.{name}"
    return {old.replace(".", "_"): new for old, new in table.items()}


def ldm_unet_name(name: str, layers_per_block: int = 2) -> str | None:
    """The diffusers name of a module or parameter of a UNet in latent-diffusion's layout.

    Args:
      name: with dots, or with underscores in their place as in LoRA files of kohya's scripts; the
        result is spelled alike.
      layers_per_block: of the UNet's config.json.

    Returns:
      For "input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"; None for a name of no
      such UNet.
    """
    dot, table = "." if "." in name else "_", _unet_table(layers_per_block)
    for end in range(len(name), 0, -1):  # the longest module that is known
        if name[end : end + 1] in ("", dot) and (new := table.get(name[:end].replace(".", "_"))):
            return new.replace(".", dot) + name[end:]
    return None


def _unet(tensors: Tensors) -> Tensors:
    """Layers a block: the first downsampler stands behind the first level's."""
    downs = _numbers(r"input_blocks\.(\d+)\.0\.op\.", tensors)
    every = _numbers(r"input_blocks\.(\d+)\.", tensors)
    layers = min(downs) - 1 if downs else max(every, default=1)
    # A name of no UNet stays, so that loading reports it.
    return {ldm_unet_name(key, layers) or key: tensor for key, tensor in tensors.items()}


def _numbers(pattern: str, keys: Iterable[str]) -> list[int]:
    return [int(match[1]) for key in keys if (match := re.match(pattern, key))]


# latent-diffusion's autoencoder: ldm/modules/diffusionmodules/model.py.
_VAE_NAMES = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
)


def _vae(tensors: Tensors) -> Tensors:
    """Levels of the decoder count from the lowest resolution; attention is linear, not 1x1 conv."""
    levels = _numbers(r"decoder\.up\.(\d+)\.", tensors)
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in _VAE_NAMES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"(?<=\.up_blocks\.)\d+", lambda match: str(max(levels) - int(match[0])), key)
        if re.search(r"attentions\.0\.to_\w+(\.0)?\.weight$", key):
            tensor = tensor.reshape(*tensor.shape[:2])
        renamed[key] = tensor
    return renamed
