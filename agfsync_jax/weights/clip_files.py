"""A CLIP on disk: a folder of transformers or of open_clip, or weights alone."""

import functools
import tempfile
from pathlib import Path

from agfsync_jax.data.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    pad_and_normalize,
    preprocessing,
    resize_and_normalize,
)
from agfsync_jax.data.tokenizers import ClipTokenizer, OpenClipTokenizer, write_clip_tokenizer
from agfsync_jax.weights.networks import find_tensors, read_json
from agfsync_jax.weights.open_clip import open_clip_config, open_clip_to_transformers
from agfsync_jax.weights.places import local_files, resolve_path
from agfsync_jax.weights.tensor_files import open_tensors


class ClipFiles:
    """What a CLIP is made of; no tensor is read.

    Args:
        path: see weights/places.py. A folder has a config.json (transformers) or an
            open_clip_config.json (open_clip). A file holds the weights of either.
        architecture: of a file: open_clip's name of it, such as "ViT-H-14", or "ViT-L-14-quickgelu"
            for OpenAI's activation (weights/open_clip.py).
        pad: resize the longer edge and pad with black, as HPSv2's code does, whatever the folder
            says.
        antialias: with `pad`; see `pad_and_normalize`.

    Attributes:
        config: config.json of a transformers CLIPModel.
        tensors: by its keys.
        tokenize: texts -> int32 [b, n]. Where the folder has no tokenizer it is CLIP's own.
        preprocess: uint8 [b, h, w, 3] -> the vision tower's float32 [b, H, W, 3].

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a model of other parts than a CLIPModel, or files that are not whole.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        architecture: str = "",
        pad: bool = False,
        antialias: bool = True,
    ):
        source = resolve_path(path)
        folder = local_files(source) if source.is_dir() else None
        is_open_clip = True
        if folder is None:
            if not architecture:
                raise ValueError(
                    f"{source} does not say what model it is of: set the scorer's architecture, "
                    "such as ViT-H-14, to open_clip's name of it."
                )
            self.config, tensors = open_clip_config(architecture), open_tensors(source)
        elif (folder / "config.json").exists():
            self.config, tensors = read_json(folder / "config.json"), find_tensors(source)
            is_open_clip = False
        elif (folder / "open_clip_config.json").exists():
            self.config = open_clip_config(read_json(folder / "open_clip_config.json"))
            tensors = find_tensors(source)
        else:
            raise FileNotFoundError(
                f"{source} is no CLIP: it has neither config.json nor open_clip_config.json."
            )
        if not any(key.startswith(("text_model.", "vision_model.")) for key in tensors):
            tensors = open_clip_to_transformers(tensors)
        self.tensors = tensors
        if is_open_clip:
            self.tokenize = OpenClipTokenizer(folder)
        elif _has(folder, "tokenizer.json", "vocab.json"):
            self.tokenize = ClipTokenizer(folder)
        else:
            with tempfile.TemporaryDirectory(prefix="agfsync-") as aside:
                self.tokenize = ClipTokenizer(write_clip_tokenizer(aside))
        size = (self.config.get("vision_config") or {}).get("image_size", 224)
        resize = {"size": size, "mean": OPENAI_MEAN, "std": OPENAI_STD}
        if pad:
            self.preprocess = functools.partial(pad_and_normalize, **resize, antialias=antialias)
            return
        if folder and _has(folder, "preprocessor_config.json", "open_clip_config.json"):
            resize = preprocessing(folder)
        self.preprocess = functools.partial(resize_and_normalize, **resize)


def _has(folder: Path, *names: str) -> bool:
    return any((folder / name).exists() for name in names)
