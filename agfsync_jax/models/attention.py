"""Scaled dot-product attention (Vaswani et al. 2017) and the kernels that compute it.

A network calls `attention`; who traces the network says what computes it:

    with using("auto", mesh):
        step = jax.jit(...).lower(...).compile()

All kernels give what `plain` gives, up to rounding; they differ in memory and speed.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

KERNELS = {
    "auto": "by the platform and by the shapes of each call",
    "plain": "XLA, all scores at once; on any platform",
    "chunked": "XLA, the scores of one head and some queries at a time; on any platform",
    "cudnn": "cuDNN's flash attention; on NVIDIA GPUs of compute capability 8.0 and later",
    "flash": "flash attention in Pallas; on TPUs",
}
# Axes of the mesh that shard the batch, and those that shard the heads.
BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)
# "auto" is plain for fewer queries or keys: the scores of one head then take less than 4 MB.
LONG = 1024
CHUNK_SCORES = 2**21  # 8 MB in float32, which stay in a cache
LANES = 128  # of a TPU's vectors: what flash pads to
MAX_BLOCK = 1024  # rows of LANES columns that flash holds at once: more overflow a TPU's VMEM

# The (kernel, mesh) of `using`. JAX keeps one a thread and makes it part of the key of its caches:
# a function that is jitted once and called under two kernels is traced twice.
_CONTEXT = jax.make_user_context(("plain", None))


def attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
) -> Float[Array, "b s h d"]:
    """Scaled dot-product attention; softmax in float32.

    The kernel is that of `using`, "plain" outside of it, as far as it can take the call: see
    `choose`. With a mask or a bias it is always "plain".

    `mask` (True = attend) and the additive `bias` broadcast to [b, h, s, t]; `scale` is
    d ** -0.5 unless given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel, mesh = _CONTEXT.value
    if mask is None and bias is None:
        kernel = choose(kernel, mesh, q, k)
        if kernel != "plain":
            return sharded(functools.partial(_FUNCTIONS[kernel], scale=scale), mesh, q, k, v)
    return plain(q, k, v, mask=mask, bias=bias, scale=scale)


def using(kernel: str, mesh: Mesh) -> AbstractContextManager:
    """Makes every call of `attention` that is traced inside, in this thread, use a kernel.

    Args:
      kernel: one of `KERNELS`.
      mesh: the devices that the program is for, which need not be of this host.

    Raises:
      ValueError: an unknown kernel, or one that the devices of the mesh cannot run.
    """
    _check(kernel, mesh)
    return _CONTEXT((kernel, mesh))


def describe(kernel: str, mesh: Mesh) -> str:
    """In one line, what `using(kernel, mesh)` computes attention with, and why; raises as it does.

    For example "attention: chunked over queries (plain below 1024 queries or keys), as the devices
    are CPUs".
    """
    _check(kernel, mesh)
    used = _best(mesh) if kernel == "auto" else kernel
    text = {
        "plain": "plain",
        "chunked": "chunked over queries",
        "cudnn": "cuDNN flash, chunked for heads above 128 or not in 16 bits",
        "flash": "Pallas flash, chunked for float16",
    }[used]
    if kernel != "auto":
        return f"attention: {text}, as configured"
    below = f"(plain below {LONG} queries or keys)"
    return f"attention: {text} {below}, as the devices are {_devices(mesh)}"


def choose(kernel: str, mesh: Mesh | None, q: Array, k: Array) -> str:
    """The kernel of one call without a mask or a bias, "auto" resolved.

    "auto" is "plain" unless queries and keys are both `LONG`, and then "cudnn", "flash" or, where
    neither runs, "chunked". A call whose dtype or head size "cudnn" or "flash" cannot take is
    "chunked" where it is long, else "plain".
    """
    is_long = min(q.shape[1], k.shape[1]) >= LONG
    if kernel == "auto":
        kernel = _best(mesh) if is_long else "plain"
    size = q.shape[-1]
    taken = {
        "cudnn": q.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= 128,
        "flash": q.dtype in (jnp.bfloat16, jnp.float32) and size <= 512,
    }.get(kernel, True)
    if not taken:
        kernel = "chunked" if is_long else "plain"
    return kernel


def plain(q, k, v, *, mask=None, bias=None, scale: float) -> Float[Array, "b s h d"]:
    """All scores at once; arguments as of `attention`."""
    # The scale enters after the sum, in float32: in bfloat16 it would round every query once more.
    weights = scale * jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        weights = weights + jnp.broadcast_to(bias, weights.shape)
    if mask is not None:
        weights = jnp.where(
            jnp.broadcast_to(mask, weights.shape), weights, jnp.finfo(weights.dtype).min
        )
    weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


def chunked(q, k, v, *, scale: float) -> Float[Array, "b s h d"]:
    """One head and as many queries at a time as have `CHUNK_SCORES` scores (Rabe & Staats 2021).

    The keys are not split, so each softmax is whole. The gradient computes the scores again, from
    sums that are kept (Dao et al. 2022).
    """
    (b, s, h, d), t = q.shape, k.shape[1]
    chunks = math.ceil(s / max(1, CHUNK_SCORES // t))
    rows = math.ceil(s / chunks)
    q = jnp.pad(q, ((0, 0), (0, chunks * rows - s), (0, 0), (0, 0)))
    # Heads first: these are plain matrix products, with nothing left to transpose in the loop.
    q, k, v = (x.swapaxes(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    out = _chunks(q.reshape(b * h, chunks, rows, d), k, v, scale)
    return out.reshape(b, h, chunks * rows, d)[:, :, :s].swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunks(
    q: Float[Array, "n c r d"], k: Float[Array, "n t d"], v: Float[Array, "n t d"], scale: float
) -> Float[Array, "n c r d"]:
    """Attention of n heads, whose queries are in c chunks of r rows."""
    return _chunks_forward(q, k, v, scale)[0]


def _chunks_forward(q, k, v, scale):
    def head(qkv):
        q, k, v = qkv

        def chunk(q):  # [r, d]
            scores = scale * _dot(q, k.T)
            largest = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(axis=-1, keepdims=True)
            # Divided last: the result is smaller than the weights.
            out = _dot(weights.astype(v.dtype), v) / total
            return out.astype(v.dtype), largest + jnp.log(total)

        return lax.map(chunk, q)

    out, logsumexp = lax.map(head, (q, k, v))
    return out, (q, k, v, out, logsumexp)


def _chunks_backward(scale, residuals, gradient):
    """As FlashAttention's (Dao et al. 2022): the weights come from the scores and their sums."""

    def head(residuals):
        q, k, v, out, logsumexp, gradient = residuals

        def chunk(sums, rows):
            q, out, logsumexp, gradient = rows
            mean = jnp.sum(gradient.astype(jnp.float32) * out, axis=-1, keepdims=True)
            weights = jnp.exp(scale * _dot(q, k.T) - logsumexp)  # [r, t]
            scores = scale * weights * (_dot(gradient, v.T) - mean)
            dq = _dot(scores.astype(k.dtype), k).astype(q.dtype)
            # Both once more, as [t, r]: cheaper than products with what would be transposed.
            weights = jnp.exp(scale * _dot(k, q.T) - logsumexp.T)
            scores = scale * weights * (_dot(v, gradient.T) - mean.T)
            dk, dv = sums
            dk += _dot(scores.astype(q.dtype), q)
            dv += _dot(weights.astype(gradient.dtype), gradient)
            return (dk, dv), dq

        zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        (dk, dv), dq = lax.scan(chunk, zeros, (q, out, logsumexp, gradient))
        return dq, dk.astype(k.dtype), dv.astype(v.dtype)

    return lax.map(head, (*residuals, gradient))


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def cudnn(q, k, v, *, scale: float) -> Float[Array, "b s h d"]:
    """cuDNN's flash attention: float16 or bfloat16, d a multiple of 8 and at most 128."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")


def flash(q, k, v, *, scale: float) -> Float[Array, "b s h d"]:
    """FlashAttention (Dao et al. 2022) for TPUs, by JAX's Pallas kernel: float32 or bfloat16.

    Lengths are padded with zeros to whole blocks, and a segment of their own hides the keys among
    them. Head sizes above `LANES` are padded to its next multiple (160 to 256), which adds zeros to
    the scores and columns that are cut off. A TPU's memory would pad them anyway.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel  # slow, for TPUs only

    (b, s, _, d), t = q.shape, k.shape[1]
    block_q, block_k = _block(s, d), _block(t, d)
    wider = -d % LANES if d > LANES else 0

    def pad(x, block):  # [b, s, h, d] -> [b, h, s, d], padded
        pads = ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, wider))
        return jnp.pad(x.swapaxes(1, 2), pads)

    q, k, v = pad(q, block_q), pad(k, block_k), pad(v, block_k)
    segments = None
    if k.shape[2] > t:
        is_padding = jnp.broadcast_to(jnp.arange(k.shape[2]) >= t, (b, k.shape[2]))
        segments = kernel.SegmentIds(
            q=jnp.zeros((b, q.shape[2]), jnp.int32), kv=is_padding.astype(jnp.int32)
        )
    blocks = kernel.BlockSizes(
        block_b=1,
        block_q=block_q,
        block_k_major=block_k,
        block_k=block_k,
        block_q_major_dkv=block_q,
        block_q_dkv=block_q,
        block_k_major_dkv=block_k,
        block_k_dkv=block_k,
        block_q_dq=block_q,
        # This one repeats a number a query as often as it has keys, in the TPU's main memory.
        block_k_major_dq=math.gcd(block_k, 256),
        block_k_dq=math.gcd(block_k, 256),
    )
    out = kernel.flash_attention(q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=blocks)
    return out[:, :, :s, :d].swapaxes(1, 2)


_FUNCTIONS = {"chunked": chunked, "cudnn": cudnn, "flash": flash}


def sharded(function: Callable, mesh: Mesh, q, k, v) -> Float[Array, "b s h d"]:
    """function(q, k, v), each device on its own examples and heads.

    The partitioner knows neither how to split a kernel nor that a loop over heads can be split. An
    axis that does not divide the examples, or the heads, is left out: its devices all do the same.
    """

    def dividing(axes, size):
        used = ()
        for axis in axes:
            parts = mesh.shape.get(axis, 1)
            if parts > 1 and size % parts == 0:
                used, size = (*used, axis), size // parts
        return used or None

    b, _, h, _ = q.shape
    spec = PartitionSpec(dividing(BATCH_AXES, b), None, dividing(HEAD_AXES, h))
    # Without check_vma: a Pallas kernel does not say over which axes its results vary.
    split = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return split(q, k, v)


def by_example(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """`x` with its examples split over the mesh of `using`, where that divides them.

    A layer says so of what goes in and comes out: where the same axis splits its weights, the
    partitioner has to gather those, and may not split the features of the activations instead.
    """
    _, mesh = _CONTEXT.value
    parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES) if mesh else 1
    if parts == 1 or x.shape[0] % parts:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *rest)))


def gathered(kernel: Array) -> Array:
    """A layer's weights, whole on every device, and so their gradient, before it is split again.

    Left to itself, the partitioner passes parts of products around instead. With tensor parallelism
    weights stay split as they are.
    """
    _, mesh = _CONTEXT.value
    if mesh is None or mesh.size == 1 or mesh.shape.get("tensor", 1) > 1:
        return kernel
    return lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))


def split_heads(x: Float[Array, "b s c"], heads: int) -> Float[Array, "b s h d"]:
    """Splits the channels into attention heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b s h d"]) -> Float[Array, "b s c"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _block(length: int, head_size: int) -> int:
    """The rows of a flash block: as if each block cost `LANES` rows more than it has."""
    largest = MAX_BLOCK // math.ceil(head_size / LANES)
    sizes = range(LANES, largest + 1, LANES)
    return min(sizes, key=lambda size: math.ceil(length / size) * (size + LANES))


def _best(mesh: Mesh) -> str:
    """The kernel of long calls under "auto"."""
    return next(kernel for kernel in ("flash", "cudnn", "chunked") if _runs(kernel, mesh))


def _runs(kernel: str, mesh: Mesh) -> bool:
    """Whether the devices of a mesh can run a kernel."""
    device = mesh.devices.flat[0]
    if kernel == "cudnn":
        # A number for NVIDIA's GPUs, such as "9.0"; a name for AMD's, such as "gfx942".
        capability = getattr(device, "compute_capability", "").split(".")[0]
        return device.platform in ("gpu", "cuda") and capability.isdigit() and int(capability) >= 8
    return kernel != "flash" or device.platform == "tpu"


def _devices(mesh: Mesh) -> str:
    """What the devices are, in words."""
    device = mesh.devices.flat[0]
    kind = "" if device.device_kind == device.platform else f" ({device.device_kind})"
    return f"{device.platform.upper()}s{kind}"


def _check(kernel: str, mesh: Mesh) -> None:
    if kernel in KERNELS and _runs(kernel, mesh):
        return
    choices = "; ".join(f'"{name}": {text}' for name, text in KERNELS.items() if _runs(name, mesh))
    problem = f"cannot run on {_devices(mesh)}" if kernel in KERNELS else "is unknown"
    raise ValueError(f'Attention kernel "{kernel}" {problem}. Set it to one of: {choices}.')
