"""A text-to-image checkpoint on disk: a diffusers folder, or everything in a single file."""

import tempfile
from pathlib import Path
from typing import Any

from agfsync_jax.weights import skeletons
from agfsync_jax.weights.networks import find_tensors, read_json
from agfsync_jax.weights.places import local_files, resolve_path
from agfsync_jax.weights.single_files import split_single_file
from agfsync_jax.weights.tensor_files import Tensor, open_tensors


class PipelineFiles:
    """What lies in a checkpoint; no tensor is read.

    A single file has neither configs nor tokenizers: those of the released model that it is of are
    written to a folder that lives as long as this object.

    Args:
        path: see weights/places.py.
        variant: of the files in a folder, such as "fp16".
        kind: of a single file, one of `skeletons.KINDS`; needed only where the file does not
            tell.

    Attributes:
        folder: local, in diffusers' layout: model_index.json, configs, scheduler, tokenizers.
        index: model_index.json.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or something else.
    """

    def __init__(self, path: str | Path, *, variant: str = "", kind: str = ""):
        self.source, self._variant = resolve_path(path, variant=variant), variant
        self._parts = None
        if self.source.is_file():
            kind, self._parts = split_single_file(open_tensors(self.source), kind or None)
            self._aside = tempfile.TemporaryDirectory(prefix="agfsync-")
            self.folder = Path(self._aside.name)
            skeletons.write_skeleton(kind, self.folder)
        else:
            self.folder = local_files(self.source)
        self.index = read_json(self.folder / "model_index.json")

    def has(self, part: str) -> bool:
        """Whether model_index.json lists this part."""
        entry = self.index.get(part)
        return isinstance(entry, list) and entry[0] is not None

    def config(self, part: str) -> dict[str, Any]:
        """The config.json of a network; raises as `read_json`."""
        return read_json(self.folder / part / "config.json")

    def tensors(self, part: str) -> dict[str, Tensor]:
        """A network's, by diffusers' or transformers' keys; raises as `find_tensors`."""
        if self._parts is not None:
            return self._parts[part]
        return find_tensors(self.source / part, self._variant)
