"""CLIP models of open_clip, renamed to transformers' CLIPModel: their keys, and their configs."""

import re
from collections.abc import Mapping
from typing import Any

from agfsync_jax.weights.tensor_files import Tensor

Tensors = dict[str, Tensor]

# open_clip's CLIP: https://github.com/mlfoundations/open_clip, src/open_clip/transformer.py.
_NAMES = {
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.(weight|bias)": r"text_model.final_layer_norm.\1",
    r"text_projection(\.weight)?": "text_projection.weight",
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.conv1\.weight": "vision_model.embeddings.patch_embedding.weight",
    r"visual\.ln_pre\.(weight|bias)": r"vision_model.pre_layrnorm.\1",  # transformers' spelling
    r"visual\.ln_post\.(weight|bias)": r"vision_model.post_layernorm.\1",
    r"visual\.proj": "visual_projection.weight",
    r"logit_scale": "logit_scale",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Buffers of open_clip and of OpenAI's files.
_IGNORED = ("attn_mask", "input_resolution", "context_length", "vocab_size")


def open_clip_to_transformers(tensors: Mapping[str, Tensor]) -> Tensors:
    """A CLIP of open_clip, or of OpenAI, under the keys of transformers' CLIPModel.

    The prefix that DistributedDataParallel leaves ("module.") and the one of a text tower in
    open_clip's CustomTextCLIP ("text.") are taken off.

    Raises:
      ValueError: keys that a CLIPModel has no place for, all of them listed.
    """
    renamed, unknown = rename_open_clip(tensors)
    if unknown:
        lines = "".join(f"\n  {key} {list(tensors[key].shape)}" for key in unknown)
        raise ValueError(
            f"Of this open_clip checkpoint {len(unknown)} tensors have no place in a CLIP of two "
            f"plain towers:{lines}"
        )
    return renamed


def rename_open_clip(tensors: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """(renamed, keys that are not known)."""
    renamed, unknown = {}, []
    for stored, tensor in tensors.items():
        key = re.sub(r"^(module\.)?(text\.)?", "", stored)
        tower = "vision_model" if key.startswith("visual.") else "text_model"
        layer = re.fullmatch(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](\w+)", key)
        place = next((place for place in _NAMES if re.fullmatch(place, key)), None)
        if layer and layer[2] == "attn.in_proj":
            for name, part in zip("qkv", tensor.split(3), strict=True):
                inner = f"self_attn.{name}_proj.{layer[3]}"
                renamed[f"{tower}.encoder.layers.{layer[1]}.{inner}"] = part
        elif layer and layer[2] in _LAYER:
            inner = f"{_LAYER[layer[2]]}.{layer[3]}"
            renamed[f"{tower}.encoder.layers.{layer[1]}.{inner}"] = tensor
        elif place:
            if key in ("text_projection", "visual.proj"):
                tensor = tensor.transpose(1, 0)  # open_clip multiplies by it from the right
            elif key == "logit_scale":
                tensor = tensor.reshape()  # [1] in some
            renamed[re.sub(place, _NAMES[place], key)] = tensor
        elif key not in _IGNORED:
            unknown.append(stored)
    return renamed, unknown


# Architecture -> width of the projection; layers, width, patch, width of a head and mlp_ratio of
# the vision tower; layers and width of the text tower: open_clip's model_configs/*.json.
_ARCHITECTURES = {
    "ViT-B-32": (512, (12, 768, 32, 64, 4.0), (12, 512)),
    "ViT-B-16": (512, (12, 768, 16, 64, 4.0), (12, 512)),
    "ViT-L-14": (768, (24, 1024, 14, 64, 4.0), (12, 768)),
    "ViT-H-14": (1024, (32, 1280, 14, 80, 4.0), (24, 1024)),
    "ViT-g-14": (1024, (40, 1408, 14, 88, 4.3637), (24, 1024)),
    "ViT-bigG-14": (1280, (48, 1664, 14, 104, 4.9231), (32, 1280)),
}
# Fields of a model_cfg that are read or change nothing, as one token is pooled and nothing dropped;
# and the values that a CLIPModel has of others. Of the rest it does what null says.
_KNOWN = re.compile(
    r"embed_dim|vision_cfg|text_cfg|quick_gelu|custom_text|init_logit_scale|nonscalar_logit_scale|"
    r"output_dict|\w+\.(layers|width|mlp_ratio|output_tokens|final_ln_after_pool|patch_dropout|"
    r"attn_pooler_\w+|pad_id|eos_id|timm_(?!model_name)\w+|hf_(proj_type|pooler_type|"
    r"model_pretrained))|vision_cfg\.(head_width|patch_size|image_size)|"
    r"text_cfg\.(heads|context_length|vocab_size)"
)
_USUAL = {
    "vision_cfg.pool_type": "tok",
    "vision_cfg.pos_embed_type": "learnable",
    "vision_cfg.block_type": "default",
    "text_cfg.pool_type": "argmax",
    "text_cfg.proj_type": "linear",
    "text_cfg.block_type": "default",
}


def open_clip_config(source: str | Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the CLIPModel that does what an open_clip model does.

    Args:
      source: an open_clip_config.json, its "model_cfg", or the name of an architecture, such as
        "ViT-L-14", "ViT-L-14-336" or "ViT-L-14-quickgelu": "-336" and the like is the size of the
        image, and OpenAI's weights are of the "-quickgelu" ones.

    Raises:
      ValueError: an unknown name; fields that a CLIPModel cannot do, all of them listed.
    """
    model = _named(source) if isinstance(source, str) else source.get("model_cfg", source)
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    wrong = []
    for place, fields in (("", model), ("vision_cfg.", vision), ("text_cfg.", text)):
        for field, value in fields.items():
            name = place + field
            if value and not _KNOWN.fullmatch(name) and value != _USUAL.get(name):
                wrong.append(f"{name}={value!r}")
    size, patch = (
        value[0] if isinstance(value, list | tuple) and len({*value}) == 1 else value
        for value in (vision.get("image_size", 224), vision.get("patch_size", 16))
    )
    for name, value in (("layers", vision.get("layers", 12)), ("image_size", size)):
        if not isinstance(value, int):
            wrong.append(f"vision_cfg.{name}={value!r}")
    if "embed_dim" not in model:
        wrong.append("no embed_dim")
    if wrong:
        raise ValueError(
            "transformers' CLIPModel, two plain towers, cannot do what this open_clip model does: "
            f"{', '.join(wrong)}."
        )
    vision_width, vocab = vision.get("width", 768), text.get("vocab_size", 49408)

    def tower(fields: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": int(width * fields.get("mlp_ratio", 4.0)),
            "num_hidden_layers": fields.get("layers", 12),
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "projection_dim": model["embed_dim"],
        }

    return {
        "projection_dim": model["embed_dim"],
        "text_config": tower(text, text.get("width", 512), text.get("heads", 8))
        | {
            "vocab_size": vocab,
            "max_position_embeddings": text.get("context_length", 77),
            # open_clip pools at the largest id: where a text ends, and it is padded with "!".
            "bos_token_id": vocab - 2,
            "eos_token_id": vocab - 1,
            "pad_token_id": 0,
        },
        "vision_config": tower(vision, vision_width, vision_width // vision.get("head_width", 64))
        | {"image_size": size, "patch_size": patch},
    }


def _named(name: str) -> dict[str, Any]:
    """The model_cfg of an architecture."""
    match = re.fullmatch(r"(ViT-\w+-\d+)(?:-(\d+))?(-quickgelu)?", name)
    if not match or match[1] not in _ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture of open_clip {name!r}: expected one of "
            f"{', '.join(_ARCHITECTURES)}, with the size of the image (-336) or -quickgelu behind "
            "it; or give the model's open_clip_config.json."
        )
    embed, vision, (layers, width) = _ARCHITECTURES[match[1]]
    names = ("layers", "width", "patch_size", "head_width", "mlp_ratio")
    return {
        "embed_dim": embed,
        "quick_gelu": bool(match[3]),
        "vision_cfg": dict(zip(names, vision, strict=True)) | {"image_size": int(match[2] or 224)},
        "text_cfg": {"width": width, "heads": width // 64, "layers": layers},
    }
