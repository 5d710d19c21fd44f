"""What prompts condition a denoiser on, computed once per distinct prompt: encoders are frozen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float16, Int

from agfsync_jax.data.loader import put_rows
from agfsync_jax.parallel.sharding import batch_sharding, filled, replicated


class BatchEncoder:
    """`encode` as one compiled program: `encoder(rows)` is a pytree of numpy arrays [n, ...].

    Args:
        encode: (params, rows [b, ...]) -> a pytree of arrays [b, ...], row by row.
        params: what it is given first, on `mesh`.
        batch_size: rows of the program; a multiple of the mesh's data and fsdp axes.
        mesh: rows are split over its data and fsdp axes.
    """

    def __init__(
        self, encode: Callable[[Any, Array], Any], params: Any, batch_size: int, mesh: Mesh
    ):
        self.batch_size = batch_size
        self._params, self._sharding = params, batch_sharding(mesh)
        self._program = jax.jit(encode, out_shardings=replicated(mesh))

    def start(self, rows: np.ndarray) -> Any:
        """The pytree [batch_size, ...] of 1 to `batch_size` rows, still to come on the devices."""
        batch = jax.device_put(filled(rows, self.batch_size), self._sharding)
        return self._program(self._params, batch)

    def __call__(self, rows: np.ndarray) -> Any:
        size = self.batch_size
        starts = range(0, len(rows), size)
        chunks = [jax.device_get(self.start(rows[start : start + size])) for start in starts]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *chunks)


def to_half(values: Any, what: str, instead: str) -> Float16[np.ndarray, "..."]:
    """Numbers as float16; ValueError if one of them is not finite in it, which says `instead`."""
    values = np.asarray(values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        largest = np.abs(values.astype(np.float32)).max()
        raise ValueError(f"{what} do not fit float16 (the largest is {largest:.4g}): {instead}.")
    return half


class PromptEmbeddings:
    """A table from rows to conditioning: `embeddings(rows)` is a batch of it.

    The table lies in main memory, on every process, at the encoder's own precision: 0.2 MB a
    distinct prompt for Stable Diffusion 1.x in float32; half of that where the pairs stored it.

    Args:
        table: name -> [m, ...], what each distinct prompt is encoded to.
        index: [n], which of them an example has.
        mesh: batches are split over its data and fsdp axes.
    """

    def __init__(self, table: Mapping[str, np.ndarray], index: Int[np.ndarray, " n"], mesh: Mesh):
        self._table, self._index = dict(table), index
        self._sharding = batch_sharding(mesh)

    @classmethod
    def encode(
        cls, backbone: Any, tokens: Int[np.ndarray, "n l"], batch_size: int, mesh: Mesh
    ) -> "PromptEmbeddings":
        """Encodes each distinct row of `tokens`, one row an example, once; see `BatchEncoder`.

        The backbone's parameters (see backbones/) are read here and not kept.
        """
        distinct, index = np.unique(tokens, axis=0, return_inverse=True)
        encoder = BatchEncoder(backbone.encode_prompt, backbone.params, batch_size, mesh)
        return cls(encoder(distinct), index.reshape(-1), mesh)

    def __call__(self, rows: Int[np.ndarray, " b"]) -> dict[str, Array]:
        """The conditioning of these rows of `index`, as `put_rows` makes a batch of it."""
        found = self._index[rows]
        return {name: put_rows(leaf, found, self._sharding) for name, leaf in self._table.items()}
