"""Aesthetic score: the LAION predictor's number for an image, from its CLIP embedding alone.

Source: christophschuhmann/improved-aesthetic-predictor; the embedding is divided by its length.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open

from agfsync_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from agfsync_jax.scorers.clip import ClipEncoder
from agfsync_jax.utils import weights

_FIRST = "layers.0.weight"


def load_head(path: str) -> tuple[nnx.GraphDef, nnx.State]:
    """An AestheticPredictor from a .safetensors file, of the input size that its weights have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors, or not the tensors of this predictor: all are listed.
    """
    file = weights.resolve_path(path)
    try:
        with safe_open(file, framework="np") as tensors:
            if _FIRST not in tensors.keys():
                raise ValueError(
                    f"{file} is no aesthetic head: expected {_FIRST} among its tensors, found"
                    f" {', '.join(sorted(tensors.keys())[:8])}."
                )
            input_size = tensors.get_slice(_FIRST).get_shape()[1]
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}). A published .pth is converted once"
            " with safetensors.torch.save_file(torch.load(path, weights_only=True), new_path)."
        ) from error
    graph, abstract = weights.abstract_model(AestheticPredictor, AestheticConfig(input_size))
    return graph, weights.fill_params(AestheticPredictor, abstract, [file])


class Scorer:
    """Column aesthetic, float32 [b].

    Args:
        mesh: see `ClipEncoder`.
        path: the CLIP folder on whose image embedding the head was trained.
        head: the head's .safetensors.
        batch_size: images at a time.
        dtype: of CLIP's computation.

    Raises:
        FileNotFoundError, ValueError: no such weights, or a head for another embedding size.
    """

    asks_questions = False

    def __init__(
        self, mesh: Mesh, *, path: str, head: str, batch_size: int = 64, dtype: str = "float32"
    ):
        graph, self._params = load_head(head)
        self._encoder = ClipEncoder(mesh, path, batch_size, dtype)
        expected = self._params["layers"][0]["kernel"].shape[0]
        if self._encoder.size != expected:
            raise ValueError(
                f"the head {head} takes embeddings of {expected} numbers, the CLIP of {path} makes"
                f" {self._encoder.size}: they do not belong together."
            )
        self._score = jax.jit(lambda params, x: nnx.merge(graph, params)(x))

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        embeddings = jnp.asarray(self._encoder.images(images))
        return {"aesthetic": np.asarray(self._score(self._params, embeddings))}
