"""Models that several scorers use are loaded once, for as long as one of them lives."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from jax.sharding import Mesh

T = TypeVar("T")

_alive: weakref.WeakValueDictionary[tuple, Any] = weakref.WeakValueDictionary()


def shared(make: Callable[..., T], mesh: Mesh, **settings: Any) -> T:
    """`make(mesh, **settings)`, or what the same call has made before, if it is still in use."""
    bound = inspect.signature(make).bind(mesh, **settings)
    bound.apply_defaults()
    key = make, mesh, repr(bound.arguments)
    made = _alive.get(key)
    if made is None:
        made = _alive[key] = make(mesh, **settings)
    return made
