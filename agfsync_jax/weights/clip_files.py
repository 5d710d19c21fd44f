"""A CLIP on disk: a folder of transformers or of open_clip, or weights alone."""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

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
        is_folder = source.is_dir()
        open_clip = is_folder and (source / "open_clip_config.json").exists()
        if is_folder and (source / "config.json").exists():
            self.config, open_clip = read_json(source / "config.json"), False
        elif open_clip:
            self.config = open_clip_config(read_json(source / "open_clip_config.json"))
        elif is_folder:
            raise FileNotFoundError(
                f"{source} is no CLIP: it has neither config.json nor open_clip_config.json."
            )
        elif architecture:
            self.config = open_clip_config(architecture)
        else:
            raise ValueError(
                f"{source} does not say what model it is of: set the scorer's architecture, such "
                "as ViT-H-14, to open_clip's name of it."
            )
        self.tensors = find_tensors(source) if is_folder else open_tensors(source)
        if not any(key.startswith(("text_model.", "vision_model.")) for key in self.tensors):
            self.tensors = open_clip_to_transformers(self.tensors)
        folder = local_files(source) if is_folder else None
        self.tokenize = _tokenizer(folder, open_clip or not is_folder)
        self.preprocess = self._preprocess(None if pad else folder)
        if pad:
            self.preprocess = functools.partial(
                pad_and_normalize, **self.preprocess.keywords, antialias=antialias
            )

    def _preprocess(self, folder: Path | None) -> functools.partial:
        if folder is not None:
            names = ("preprocessor_config.json", "open_clip_config.json")
            if any((folder / name).exists() for name in names):
                return functools.partial(resize_and_normalize, **preprocessing(folder))
        size = (self.config.get("vision_config") or {}).get("image_size", 224)
        return functools.partial(resize_and_normalize, size=size, mean=OPENAI_MEAN, std=OPENAI_STD)


def _tokenizer(
    folder: Path | None, open_clip: bool
) -> Callable[[Sequence[str]], Int[np.ndarray, "b n"]]:
    if open_clip:
        return OpenClipTokenizer(folder)
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        return ClipTokenizer(folder)
    with tempfile.TemporaryDirectory(prefix="agfsync-") as aside:
        return ClipTokenizer(write_clip_tokenizer(aside))
