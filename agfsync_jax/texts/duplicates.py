"""Near duplicates among texts, by the cosine of their embeddings, without an n x n matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_ROUNDING = 1e-3  # that the square of a row's length may be from one


def near_duplicates(
    embeddings: Float[np.ndarray, "n d"],
    threshold: float = 0.9,
    *,
    known: int = 0,
    block: int = 4096,
    on_progress: Callable[[int], object] | None = None,
) -> Int[np.ndarray, " n"]:
    """Which rows say nearly the same as one before them.

    Row by row in their order: one is dropped where its cosine with an earlier row that was kept is
    at least the threshold. What is near to dropped rows alone is kept.

    Args:
        embeddings: rows of length one.
        threshold: of the cosine, which is in float32: 1 finds not even all exact copies.
        known: the first so many rows are kept whatever they are.
        block: rows that are compared with as many at once; memory is block * block floats.
        on_progress: gets the number of rows that were done since it was last called.

    Returns:
        of each row -1 where it is kept, else the kept row that it is nearest to, the first of
        equal ones.

    Raises:
        ValueError: rows of another length, or a threshold, known or block that cannot be.
    """
    rows = np.asarray(embeddings, np.float32)
    count = len(rows)
    if not (0 < threshold <= 1 and 0 <= known <= count and block > 0):
        raise ValueError(
            f"threshold={threshold}, known={known}, block={block}: expected a cosine above 0, at"
            f" most the {count} rows that there are, and at least one row."
        )
    off = np.abs(np.einsum("nd,nd->n", rows, rows) - 1)
    if not (off < _ROUNDING).all():
        raise ValueError(f"row {np.argmax(~(off < _ROUNDING))} is not of length one: divide by it.")
    block = min(block, max(count, 1))
    nearest = np.full(count, -1)
    kept = np.arange(known)
    if on_progress and known:
        on_progress(known)
    for start in range(known, count, block):
        own = rows[start : start + block]
        best, place = _nearest_of(own, rows, kept, block)
        cosines = own @ own.T
        is_new = np.zeros(len(own), bool)
        for i in range(len(own)):
            near = np.where(is_new, cosines[i], 0)
            j = int(np.argmax(near))
            if near[j] > best[i]:
                best[i], place[i] = near[j], start + j
            is_new[i] = best[i] < threshold
        nearest[start : start + block] = np.where(is_new, -1, place)
        kept = np.concatenate([kept, start + np.flatnonzero(is_new)])
        if on_progress:
            on_progress(len(own))
    return nearest


def _nearest_of(
    own: np.ndarray, rows: np.ndarray, kept: np.ndarray, block: int
) -> tuple[Float[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The largest cosine of each of `own` with the kept rows, 0 where none is above; whose."""
    queries = jax.device_put(_filled(own, block))
    best = jnp.zeros(block), jnp.zeros(block, jnp.int32)
    for start in range(0, len(kept), block):
        keys = _filled(rows[kept[start : start + block]], block)
        best = _nearer(queries, keys, start, best)
    cosines, places = (np.array(each)[: len(own)] for each in best)
    return cosines, kept[places] if len(kept) else places


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """A block of `size` rows: zeros, which are near to nothing, fill it up."""
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@jax.jit
def _nearer(
    queries: Float[Array, "b d"], keys: Float[Array, "b d"], start: int, best: tuple
) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
    """The larger of `best` and the cosines with these keys, of which the first is `start`."""
    cosines = jnp.dot(queries, keys.T, precision="highest")
    largest, place = jnp.max(cosines, axis=1), start + jnp.argmax(cosines, axis=1)
    is_nearer = largest > best[0]
    return jnp.where(is_nearer, largest, best[0]), jnp.where(is_nearer, place, best[1])
