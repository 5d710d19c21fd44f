"""What several scorers use: models that are loaded once, and batches of a fixed size."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

T = TypeVar("T")

_alive: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()


def shared(make: Callable[..., T], mesh: Mesh, **settings: Any) -> T:
    """`make(mesh, **settings)`, or what the same call has made before, if it is still in use."""
    key = make, mesh, repr(sorted(settings.items()))
    made = _alive.get(key)
    if made is None:
        made = _alive[key] = make(mesh, **settings)
    return made


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """A batch of `size` rows; copies of the first one fill it up."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])
