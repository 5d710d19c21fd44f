"""What prompts condition a denoiser on, computed once per distinct prompt: encoders are frozen."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from agfsync_jax.parallel.sharding import batch_sharding, replicated


class PromptEmbeddings:
    """A table from rows of token ids to conditioning: `embeddings(rows)` is a batch of it.

    The table lies in main memory, on every process, at the encoder's own precision: 0.2 MB a
    distinct prompt for Stable Diffusion 1.x in float32.

    Args:
        backbone: see backbones/; its parameters are read here and not kept.
        tokens: [n, length], one row an example; equal rows are encoded once.
        batch_size: prompts encoded at a time; a multiple of the mesh's data and fsdp axes.
        mesh: batches are split over its data and fsdp axes.
    """

    def __init__(self, backbone: Any, tokens: Int[np.ndarray, "n l"], batch_size: int, mesh: Mesh):
        distinct, index = np.unique(tokens, axis=0, return_inverse=True)
        self._index = index.reshape(-1)
        self._sharding = batch_sharding(mesh)
        encode = jax.jit(backbone.encode_prompt, out_shardings=replicated(mesh))
        chunks = []
        for start in range(0, len(distinct), batch_size):
            rows = np.arange(start, start + batch_size) % len(distinct)  # the last one is filled up
            batch = jax.device_put(distinct[rows], self._sharding)
            chunks.append(jax.device_get(encode(backbone.params, batch)))
        self._table = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(distinct)], *chunks)

    def __call__(self, rows: Int[np.ndarray, " b"]) -> dict[str, Array]:
        """The conditioning of these rows of `tokens`, arrays [b, ...] split over the mesh."""

        def put(leaf):
            # Asked once per device of this process, for that device's rows only.
            return jax.make_array_from_callback(
                (len(rows), *leaf.shape[1:]),
                self._sharding,
                lambda part: leaf[self._index[rows[part[0]]]],
            )

        return jax.tree.map(put, self._table)
