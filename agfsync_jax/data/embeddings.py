"""What prompts condition a denoiser on, computed once per distinct prompt: encoders are frozen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float16, Int

from agfsync_jax.parallel.sharding import batch_sharding, filled, replicated


def in_batches(
    encode: Callable[[Any, Array], Any], params: Any, batch_size: int, mesh: Mesh
) -> Callable[[np.ndarray], Any]:
    """`encode` as one compiled program, whatever the number of rows.

    Args:
        encode: (params, rows [b, ...]) -> a pytree of arrays [b, ...], row by row.
        params: what it is given first, on `mesh`.
        batch_size: rows of the program; a multiple of the mesh's data and fsdp axes.
        mesh: rows are split over its data and fsdp axes.

    Returns:
        run(rows [n, ...]), n from 1 to batch_size -> the pytree [batch_size, ...] on the devices;
        what stands behind the first n rows fills the batch up.
    """
    program = jax.jit(encode, out_shardings=replicated(mesh))
    sharding = batch_sharding(mesh)

    def run(rows):
        return program(params, jax.device_put(filled(rows, batch_size), sharding))

    return run


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
        """Encodes each distinct row of `tokens` once.

        Args:
            backbone: see backbones/; its parameters are read here and not kept.
            tokens: one row an example.
            batch_size: prompts encoded at a time; a multiple of the mesh's data and fsdp axes.
            mesh: see above.
        """
        distinct, index = np.unique(tokens, axis=0, return_inverse=True)
        run = in_batches(backbone.encode_prompt, backbone.params, batch_size, mesh)
        chunks = []
        for start in range(0, len(distinct), batch_size):
            chunks.append(jax.device_get(run(distinct[start : start + batch_size])))
        table = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(distinct)], *chunks)
        return cls(table, index.reshape(-1), mesh)

    def __call__(self, rows: Int[np.ndarray, " b"]) -> dict[str, Array]:
        """The conditioning of these rows of `index`, arrays [b, ...] split over the mesh.

        float16 becomes float32, which is exact: a denoiser casts to what it computes in.
        """

        def put(leaf):
            dtype = np.float32 if leaf.dtype == np.float16 else leaf.dtype
            # Asked once per device of this process, for that device's rows only.
            return jax.make_array_from_callback(
                (len(rows), *leaf.shape[1:]),
                self._sharding,
                lambda part: leaf[self._index[rows[part[0]]]].astype(dtype),
            )

        return {name: put(leaf) for name, leaf in self._table.items()}
