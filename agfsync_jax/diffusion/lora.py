"""Low-rank adapters on a denoiser's attention projections (LoRA, arXiv 2106.09685, equation 3).

Adapters are a plain dictionary from a projection's name in its checkpoint, such as
"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", to its two factors, "A" [in, rank]
and "B" [rank, out], beside parameters that stay as they are: the adapted kernel is
`W + alpha / rank * A @ B`.
"""

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

# The kernels that diffusers' own LoRA scripts adapt.
TARGETS = r"(^|\.)(to_q|to_k|to_v|to_out\.0)\.kernel$"

Adapters = dict[str, dict[str, Float[Array, "_ _"]]]


def init_adapters(
    key: Array, params: PyTree[Array], *, rank: int, targets: str = TARGETS
) -> Adapters:
    """Makes the adapters of every kernel [in, out] of `params` whose path matches `targets`.

    A is drawn from a normal distribution of standard deviation 1 / rank and B is zero, so that
    an adapted network starts as the network itself. Each A depends on `key` and on its place
    among the targets only.

    Raises:
        ValueError: the rank is not positive, no parameter matches, or a match is not a matrix
            that the rank fits in.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA adapters must be at least 1, not {rank}")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    kernels = {_path(keys): leaf for keys, leaf in leaves if re.search(targets, _path(keys))}
    if not kernels:
        raise ValueError(
            f"no parameter matches the LoRA targets {targets!r}; "
            f"the first of the {len(leaves)} parameters is {_path(leaves[0][0])!r}"
        )
    unfit = [
        f"{path} {kernel.shape}"
        for path, kernel in kernels.items()
        if kernel.ndim != 2 or rank > min(kernel.shape)
    ]
    if unfit:
        raise ValueError(
            f"LoRA of rank {rank} needs matrices with both sides at least {rank}, not "
            + ", ".join(unfit)
        )
    adapters = {}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        inputs, outputs = kernel.shape
        noise = jax.random.normal(jax.random.fold_in(key, index), (inputs, rank), jnp.float32)
        adapters[path.removesuffix(".kernel")] = {
            "A": noise / rank,
            "B": jnp.zeros((rank, outputs), jnp.float32),
        }
    return adapters


def merge(params: PyTree[Array], adapters: Adapters, *, alpha: float) -> PyTree[Array]:
    """Returns `params` with `alpha / rank * A @ B` added to every adapted kernel.

    Raises:
        ValueError: an adapter's name is no kernel of `params`.
    """
    unused = set(adapters)

    def adapted(keys, leaf):
        path = _path(keys)
        name = path.removesuffix(".kernel")
        if name == path or name not in adapters:
            return leaf
        unused.discard(name)
        a, b = adapters[name]["A"], adapters[name]["B"]
        return leaf + (alpha / a.shape[1] * (a @ b)).astype(leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(adapted, params)
    if unused:
        raise ValueError(f"LoRA adapters of unknown kernels: {', '.join(sorted(unused))}")
    return merged


def _path(keys) -> str:
    # A flax variable adds ".value" below the name that its module gave it.
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")
