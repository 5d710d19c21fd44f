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

from agfsync_jax.data.columns import Column
from agfsync_jax.models.aesthetic import AestheticConfig, AestheticPredictor
from agfsync_jax.scorers import clip
from agfsync_jax.weights import networks as weights
from agfsync_jax.weights.places import resolve_path
from agfsync_jax.weights.tensor_files import open_tensors

_FIRST = "layers.0.weight"


def load_head(path: str) -> tuple[nnx.GraphDef, nnx.State]:
    """An AestheticPredictor from a file, of the input size that its weights have.

    Such as the published sac+logos+ava1-l14-linearMSE.pth.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not whole, or not the tensors of this predictor: all are listed.
    """
    file = resolve_path(path)
    tensors = open_tensors(file)
    if _FIRST not in tensors or len(tensors[_FIRST].shape) != 2:
        raise ValueError(
            f"{file} is no aesthetic head: expected a matrix {_FIRST} among its tensors, found"
            f" {', '.join(sorted(tensors)[:8])}."
        )
    config = AestheticConfig(tensors[_FIRST].shape[1])
    fitted = weights.fit(AestheticPredictor, config, tensors, where=file)
    return fitted.graph, fitted.read()


class Scorer(clip.Scorer):
    """Column aesthetic, float32 [b]. Beside a CLIP scorer of the same settings the tower runs once.

    Args:
        path, mesh, batch_size, settings: of the CLIP on whose image embedding the head was
            trained, see `ClipEncoder`.
        head: the head's .safetensors or .pth.

    Raises:
        FileNotFoundError, ValueError: no such weights, or a head for another embedding size.
    """

    reads_prompt = False
    columns = {
        "aesthetic": Column(
            "how good the image looks whatever the prompt, by the aesthetic predictor"
        )
    }

    def __init__(self, mesh: Mesh, *, path: str, head: str, batch_size: int = 64, **settings: Any):
        graph, self._params = load_head(head)
        super().__init__(mesh, path=path, batch_size=batch_size, **settings)
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
