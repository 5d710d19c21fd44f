"""Low-rank adapters of a network's kernels (LoRA, arXiv 2106.09685, equation 3).

Adapters are a plain dictionary from a module's name in its checkpoint, such as
"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", to its two factors, "A" [in, rank] and
"B" [rank, out], beside parameters that stay as they are: the adapted kernel is `W + scale * A @ B`.
The paper's alpha / rank is 1 here; a file that has another one has it in its B
(weights/lora_files.py).

A convolution's A is [height, width, in, rank]: its convolution by A, then one of 1x1 by B, is one
convolution by `A @ B` [height, width, in, out].
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

_ATTENTION = r"to_q|to_k|to_v|to_out\.0"
_TRANSFORMER = r"proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
_RESNETS = r"conv1|conv2|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv"
# Which kernels of CLIP's text encoders are, as diffusers' scripts and kohya's attention.
TEXT_TARGETS = r"self_attn\.(q_proj|k_proj|v_proj|out_proj)\.kernel$"
# Which kernels of a UNet are adapted, by name.
TARGETS = {
    "attention": rf"(^|\.)({_ATTENTION})\.kernel$",  # as diffusers' own scripts
    "transformers": rf"(^|\.)({_ATTENTION}|{_TRANSFORMER})\.kernel$",  # as kohya's
    "all": rf"(^|\.)({_ATTENTION}|{_TRANSFORMER}|{_RESNETS})\.kernel$",
}

Adapters = dict[str, dict[str, Float[Array, "..."]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Branched:
    """A kernel and its adapter, which a layer keeps apart: `x W + (drop(x) A) B`.

    The sum of the two takes no memory, and beside a kernel in bfloat16 an adapter keeps its own
    precision.
    """

    kernel: Float[Array, "..."]
    A: Float[Array, "..."]
    B: Float[Array, "rank out"]
    key: Array | None = None  # of what is dropped; None: nothing is
    rate: float = dataclasses.field(default=0.0, metadata={"static": True})  # the share of it

    def __getitem__(self, index: Any) -> "Branched":
        """Itself: layers read their variables with [...]."""
        return self

    def drop(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """What the adapter sees of activations: the rest counts more, so that the mean stays."""
        if self.key is None:
            return x
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def init_adapters(
    key: Array, params: PyTree[Array], *, rank: int, targets: str = TARGETS["attention"]
) -> Adapters:
    """Makes the adapters of every kernel of `params` whose path matches `targets`.

    Kernels are matrices [in, out] and those of convolutions [height, width, in, out]. A is drawn
    from a normal distribution of standard deviation 1 / rank and B is zero, so that an adapted
    network starts as the network itself. Each A depends on `key` and on its place among the targets
    only.

    Raises:
        ValueError: the rank is not positive, no parameter matches, or a match is no kernel that the
            rank fits in.
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
        if not path.endswith(".kernel")
        or kernel.ndim not in (2, 4)
        or rank > min(math.prod(kernel.shape[:-1]), kernel.shape[-1])
    ]
    if unfit:
        raise ValueError(
            f"LoRA of rank {rank} needs kernels with inputs and outputs of at least {rank}, not "
            + ", ".join(unfit)
        )
    adapters = {}
    for index, (path, kernel) in enumerate(sorted(kernels.items())):
        *inputs, outputs = kernel.shape
        noise = jax.random.normal(jax.random.fold_in(key, index), (*inputs, rank), jnp.float32)
        adapters[path.removesuffix(".kernel")] = {
            "A": noise / rank,
            "B": jnp.zeros((rank, outputs), jnp.float32),
        }
    return adapters


def concatenate(parts: Sequence[Adapters]) -> Adapters:
    """Adapters whose product is the sum of the parts' products: ranks add up."""
    return {
        name: {
            "A": jnp.concatenate([part[name]["A"] for part in parts], axis=-1),
            "B": jnp.concatenate([part[name]["B"] for part in parts], axis=0),
        }
        for name in parts[0]
    }


def of_network(adapters: Adapters, network: str = "") -> Adapters:
    """Those of a network beside the denoiser, such as "text_encoder", whose names begin with it;
    of the denoiser's own modules without one."""
    if not network:
        return {name: own for name, own in adapters.items() if not name.startswith("text_encoder")}
    start = f"{network}."
    return {n.removeprefix(start): own for n, own in adapters.items() if n.startswith(start)}


def attach(
    params: PyTree[Array], adapters: Adapters, key: Array | None = None, dropout: float = 0.0
) -> PyTree[Array]:
    """`params` with `Branched` kernels where there are adapters; raises as `merge`.

    Args:
        key, dropout: the share of activations that each adapter does not see (as in PEFT), drawn
            from the key and the module's name.
    """

    def branch(name, kernel, a, b):
        if not dropout:
            return Branched(kernel, a, b)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return Branched(kernel, a, b, own, dropout)

    return _with_adapters(params, adapters, branch)


def merge(
    params: PyTree[Array], adapters: Adapters, *, scale: float | Float[Array, ""] = 1.0
) -> PyTree[Array]:
    """Returns `params` with `scale * A @ B` added to every adapted kernel.

    The sum is taken in float32 and cast to the kernel's dtype. Called once, it fuses the adapters;
    called in a compiled step, it keeps them apart from parameters that do not change. Several
    adapters of one network are merged one after the other, each with its scale.

    Raises:
        ValueError: adapters of no kernel of `params`, or of another shape than theirs; all listed.
    """

    def add(_, kernel, a, b):
        # Not in an accelerator's default precision, whose error would stay in a fused kernel.
        product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    return _with_adapters(params, adapters, add)


def _with_adapters(params: PyTree[Array], adapters: Adapters, join: Callable) -> PyTree[Array]:
    """`join(module, kernel, A, B)`, float32 the last two, in place of every adapted kernel."""
    unused, unfit = set(adapters), []

    def adapted(keys, leaf):
        path = _path(keys)
        name = path.removesuffix(".kernel")
        if name == path or name not in adapters:
            return leaf
        unused.discard(name)
        a, b = (jnp.asarray(adapters[name][factor], jnp.float32) for factor in "AB")
        if (*a.shape[:-1], *b.shape[1:]) != leaf.shape or a.shape[-1] != b.shape[0]:
            unfit.append(f"{name} A {a.shape} B {b.shape}, the kernel is {leaf.shape}")
            return leaf
        return join(name, leaf, a, b)

    merged = jax.tree_util.tree_map_with_path(adapted, params)
    if unused or unfit:
        raise ValueError(
            "; ".join(
                [f"LoRA adapters of unknown kernels: {', '.join(sorted(unused))}"] * bool(unused)
                + [f"LoRA adapters of another shape: {', '.join(unfit)}"] * bool(unfit)
            )
        )
    return merged


def _path(keys) -> str:
    # A flax variable adds ".value" below the name that its module gave it.
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")
