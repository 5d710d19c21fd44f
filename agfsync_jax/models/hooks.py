"""What a network leaves to whoever runs it: how its arrays lie, and which kernel attends.

with hooks.using(placement):
    step = jax.jit(...).lower(...).compile()
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import jax
from jaxtyping import Array, Float


class Hooks:
    """What layers call; these here change nothing, and attend by the plain formula.

    Others have the same methods, and are hashable: what compares equal traces the same program.
    """

    def activations(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """What goes into a layer's product with its weights, and what comes out."""
        return x

    def weights(self, kernel: Array) -> Array:
        """A layer's weights, as they go into the product."""
        return kernel

    def attention(
        self,
        kernels: Mapping[str, Callable],
        q: Float[Array, "b s h d"],
        k: Float[Array, "b t h d"],
        v: Float[Array, "b t h d"],
        *,
        scale: float,
    ) -> Float[Array, "b s h d"]:
        """`kernel(q, k, v, scale=scale)` of one of the kernels (attention.py)."""
        return kernels["plain"](q, k, v, scale=scale)


# JAX keeps one a thread and makes it part of the key of its caches: a function that is jitted once
# and called under two hooks is traced twice.
_CONTEXT = jax.make_user_context(Hooks())


def using(hooks: Hooks) -> AbstractContextManager:
    """Makes every layer that is traced inside, in this thread, call these hooks."""
    return _CONTEXT(hooks)


def current() -> Hooks:
    """Those of the innermost `using`."""
    return _CONTEXT.value
