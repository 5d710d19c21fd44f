"""Scaled dot-product attention (Vaswani et al. 2017) and the kernels that compute it.

All kernels give what `plain` gives, up to rounding; they differ in memory and speed. Which one a
call runs is decided by `hooks.using`, and is `plain` outside of it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from agfsync_jax.models import hooks

CHUNK_SCORES = 2**21  # 8 MB in float32, which stay in a cache
LANES = 128  # of a TPU's vectors: what flash pads to
MAX_BLOCK = 1024  # rows of LANES columns that flash holds at once: more overflow a TPU's VMEM


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

    With a mask or a bias the kernel is always `plain`.

    `mask` (True = attend) and the additive `bias` broadcast to [b, h, s, t]; `scale` is
    d ** -0.5 unless given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None and bias is None:
        return hooks.current().attention(KERNELS, q, k, v, scale=scale)
    return plain(q, k, v, mask=mask, bias=bias, scale=scale)


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


def _block(length: int, head_size: int) -> int:
    """The rows of a flash block: as if each block cost `LANES` rows more than it has."""
    largest = MAX_BLOCK // math.ceil(head_size / LANES)
    sizes = range(LANES, largest + 1, LANES)
    return min(sizes, key=lambda size: math.ceil(length / size) * (size + LANES))


KERNELS = {"plain": plain, "chunked": chunked, "cudnn": cudnn, "flash": flash}


def split_heads(x: Float[Array, "b s c"], heads: int) -> Float[Array, "b s h d"]:
    """Splits the channels into attention heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b s h d"]) -> Float[Array, "b s c"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def multi_head(
    q: Float[Array, "b s c"],
    k: Float[Array, "b t c"],
    v: Float[Array, "b t c"],
    heads: int,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
) -> Float[Array, "b s c"]:
    """`attention` of projected channels, in heads."""
    q, k, v = (split_heads(each, heads) for each in (q, k, v))
    return merge_heads(attention(q, k, v, mask=mask, bias=bias))
