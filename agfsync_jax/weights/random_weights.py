"""Checkpoints of real sizes and random numbers, for who has no weights at hand.

A folder is laid out as the released one. In place of the weights lies model.shapes.json: the shape
of each tensor, whose numbers are made when they are read (tensor_files.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agfsync_jax.data.tokenizers import write_text_tokenizer
from agfsync_jax.models.aesthetic import AestheticPredictor
from agfsync_jax.models.blip2 import Blip2ForConditionalGeneration
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import abstract_model, checkpoint_table, read_json
from agfsync_jax.weights.open_clip import open_clip_config
from agfsync_jax.weights.tensor_files import SHAPES

# The last part of a CLIP's path -> open_clip's name of its architecture.
_CLIPS = {
    "clip-vit-base-patch32": "ViT-B-32-quickgelu",
    "clip-vit-base-patch16": "ViT-B-16-quickgelu",
    "clip-vit-large-patch14": "ViT-L-14-quickgelu",
    "clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu",
    "CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14",
    "PickScore_v1": "ViT-H-14",
    "HPS_v2_compressed.pt": "ViT-H-14",
    "HPS_v2.1_compressed.pt": "ViT-H-14",
}
NAMES = (*skeletons.BLIP2, *_CLIPS)


def write_pipeline(kind: str, folder: Path, networks: Mapping[str, type]) -> None:
    """A text-to-image checkpoint of one of `skeletons.KINDS`; `networks` are a backbone's."""
    skeletons.write_skeleton(kind, folder)
    for name, network in networks.items():
        if (folder / name / "config.json").exists():
            _write_shapes(network, read_json(folder / name / "config.json"), folder / name)


def write_model(name: str, folder: Path) -> None:
    """A BLIP-2 or CLIP that is released under this name, one of `NAMES`.

    A BLIP-2's tokenizer is none of T5's, which is not at hand: it makes about as many tokens.
    """
    if name in skeletons.BLIP2:
        network, config = Blip2ForConditionalGeneration, skeletons.BLIP2[name]
        resize = skeletons.BLIP2_RESIZE
        write_text_tokenizer(folder)
        height, width = resize["size"]
        values = {
            "size": {"height": height, "width": width},
            "image_mean": resize["mean"],
            "image_std": resize["std"],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(values, indent=2) + "\n")
    else:
        network, config = CLIPModel, open_clip_config(_CLIPS[name])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_shapes(network, config, folder)


def write_head(folder: Path, size: int = 768) -> Path:
    """An aesthetic head for embeddings of `size` numbers; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    return _write_shapes(AestheticPredictor, {"input_size": size}, folder)


def _write_shapes(network: type, config: Mapping[str, Any], folder: Path) -> Path:
    _, abstract = abstract_model(network, network.config_class.from_dict(config))
    shapes = {key: shape for key, (_, _, shape) in checkpoint_table(abstract).items()}
    path = folder / f"model{SHAPES}"
    path.write_text(json.dumps(shapes) + "\n")
    return path
