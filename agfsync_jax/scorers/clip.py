"""CLIP score: 100 times the cosine between the embeddings of an image and of its prompt.

Hessel et al. 2021 without the factor 2.5 and the clipping at 0, as AGFSync has it; for OpenAI's
checkpoints, whose logit scale is exp(4.605) = 100, it is transformers' `logits_per_image`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from agfsync_jax import scorers
from agfsync_jax.data.columns import Column
from agfsync_jax.models.clip import CLIPModel
from agfsync_jax.models.layers import unit
from agfsync_jax.parallel.sharding import (
    batch_sharding,
    batch_shards,
    filled,
    infer_shardings,
    round_up,
)
from agfsync_jax.scorers._shared import shared
from agfsync_jax.weights.clip_files import ClipFiles
from agfsync_jax.weights.networks import fit

_TEXT_BATCH = 16  # distinct prompts are few beside images


class ClipEncoder:
    """Both towers of a CLIP: images and texts to embeddings of length one.

    Images and prompts that were in the last call are not embedded again.

    Args:
        mesh: batches are split over its data and fsdp axes, weights are whole on every device.
        path, architecture, pad, antialias: see weights/clip_files.py.
        batch_size: images at a time, rounded up to what the mesh divides.
        dtype: of the computation.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or no CLIPModel.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        path: str,
        batch_size: int = 64,
        dtype: str = "float32",
        architecture: str = "",
        pad: bool = False,
        antialias: bool = True,
    ):
        files = ClipFiles(path, architecture=architecture, pad=pad, antialias=antialias)
        config = CLIPModel.config_class.from_dict(files.config)
        fitted = fit(CLIPModel, config, files.tensors, dtype=jnp.dtype(dtype), where=path)
        graph, self._tokenize = fitted.graph, files.tokenize
        everywhere = functools.partial(infer_shardings, mesh=mesh)
        self._params = fitted.read(shardings=everywhere, label=f"{path}")
        shards = batch_shards(mesh)
        self._batch_size = round_up(batch_size, shards)
        self._text_batch = round_up(_TEXT_BATCH, shards)
        self._sharding = batch_sharding(mesh)

        def embed_images(params: nnx.State, images: UInt8[Array, "b h w 3"]):
            pixels = files.preprocess(images)
            return unit(nnx.merge(graph, params).get_image_features(pixels))

        def embed_texts(params: nnx.State, tokens):
            return unit(nnx.merge(graph, params).get_text_features(tokens))

        self._embed_images = jax.jit(embed_images)
        self._embed_texts = jax.jit(embed_texts)
        self._texts: dict[str, np.ndarray] = {}
        self._seen: UInt8[np.ndarray, "b h w 3"] | None = None  # the images last embedded
        self._embedded = np.empty(0)
        # what PickScore multiplies by
        self.logit_scale = float(np.exp(np.asarray(self._params["logit_scale"][...], np.float64)))
        self.size = self._params["visual_projection"]["kernel"].shape[-1]  # of an embedding

    def images(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        """Embeddings of images of any one size."""
        if images is not self._seen:
            self._embedded = self._in_batches(self._embed_images, images, self._batch_size)
            self._seen = images
        return self._embedded

    def texts(self, prompts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Embeddings of prompts; one that was in this or in the last call is not computed again."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            tokens = self._tokenize(new)
            made = self._in_batches(self._embed_texts, tokens, self._text_batch)
            self._texts.update(zip(new, made, strict=True))
        self._texts = {prompt: self._texts[prompt] for prompt in prompts}
        return np.stack([self._texts[prompt] for prompt in prompts])

    def cosines(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Of each image and its prompt."""
        return np.sum(self.images(images) * self.texts(prompts), axis=-1)

    def _in_batches(self, function: Callable, rows: np.ndarray, size: int) -> np.ndarray:
        """Runs batches of one fixed size, the last one filled up; results are read at the end."""
        made = []
        for start in range(0, len(rows), size):
            batch = filled(rows[start : start + size], size)
            made.append(function(self._params, jax.device_put(batch, self._sharding)))
        return np.concatenate([np.asarray(batch) for batch in made])[: len(rows)]


class Scorer(scorers.Scorer):
    """Column clip: 100 * cosine, float32 [b]. See `ClipEncoder` for the settings.

    Scores by a CLIP that was tuned for them derive from this class.
    """

    columns = {
        "clip": Column(
            "similarity of image and prompt: 100 x cosine of their CLIP embeddings", ".2f"
        )
    }
    scale = 100.0  # of the cosine
    _rest_goes_to = ClipEncoder

    def __init__(self, mesh: Mesh, *, batch_size: int = 64, **settings: Any):
        self._encoder = shared(ClipEncoder, mesh, batch_size=batch_size, **settings)

    def __call__(
        self, images: UInt8[np.ndarray, "b h w 3"], prompts: Sequence[str], questions: Any
    ) -> dict[str, Float[np.ndarray, " b"]]:
        (column,) = self.columns
        return {column: self.scale * self._encoder.cosines(images, prompts)}
