"""What every network is made of: the config base class, layers, attention, activations."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Bookkeeping that save_pretrained writes into every config.json and that changes no computation.
_BOOKKEEPING = frozenset(
    """architectures attention_dropout bos_token_id chunk_size_feed_forward dropout dtype
    eos_token_id hidden_dropout_prob id2label initializer_factor initializer_range
    is_encoder_decoder label2id model_type output_attentions output_hidden_states pad_token_id
    problem_type return_dict torch_dtype transformers_version use_cache""".split()
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network's config.json in Hugging Face's words.

    A subclass lists the fields it honors. `fixed` holds the fields that the network supports with
    certain values only (field -> the supported values), `ignored` those that change no computation
    here.
    """

    fixed: ClassVar[dict[str, tuple]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds the config from a parsed config.json.

        Raises:
          ValueError: fields that are not supported, all of them listed.
        """
        known, wrong = {}, []
        fields = {field.name for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name in fields:
                known[name] = tuple(value) if isinstance(value, list) else value
            elif name in cls.fixed:
                if value not in cls.fixed[name]:
                    supported = " or ".join(repr(option) for option in cls.fixed[name])
                    wrong.append(f"{name}={value!r} (supported: {supported})")
            elif not name.startswith("_") and name not in cls.ignored | _BOOKKEEPING:
                wrong.append(f"{name}={value!r} (unknown field)")
        if wrong:
            raise ValueError(
                f"{cls.__name__}: fields of config.json that are not supported: {'; '.join(wrong)}."
            )
        return cls(**known)


Linear = nnx.Linear
Embed = nnx.Embed
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5)


def Conv(  # noqa: N802 - reads as the layer it makes
    features_in: int,
    features_out: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    padding=None,
    use_bias: bool = True,
    **kwargs,
) -> nnx.Conv:
    """A 2D convolution over [b, h, w, c].

    `padding` is ((top, bottom), (left, right)) and keeps the size by default.
    """
    padding = ((kernel // 2, kernel // 2),) * 2 if padding is None else padding
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=(stride, stride),
        padding=padding,
        use_bias=use_bias,
        **kwargs,
    )


class GroupNorm(nnx.Module):
    """Group normalization over [b, h, w, c] (Wu & He 2018); statistics in float32, in one pass."""

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype=jnp.float32, rngs):
        if channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {groups} groups.")
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        pixels = x.reshape(b, h * w, c).astype(jnp.float32)

        def group_mean(values):  # [b, n, c] -> [b, c], equal within a group
            means = values.mean(axis=1).reshape(b, self.groups, -1).mean(axis=-1)
            return jnp.repeat(means, c // self.groups, axis=1)

        mean = group_mean(pixels)
        variance = group_mean(jnp.square(pixels)) - jnp.square(mean)
        # One multiply-add an element: the statistics fold into a scale and a shift a channel.
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None]
        shift = self.bias[...][None] - mean * scale
        return (pixels * scale[:, None] + shift[:, None]).reshape(x.shape).astype(self.dtype)


class Upsample2D(nnx.Module):
    """Nearest-neighbor doubling, then a convolution."""

    def __init__(self, channels: int, *, dtype, rngs):
        self.conv = Conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c"]:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of GELU: x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


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

    `mask` (True = attend) and the additive `bias` broadcast to [b, h, s, t]; `scale` is
    d ** -0.5 unless given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = jnp.einsum("bshd,bthd->bhst", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        weights = weights + jnp.broadcast_to(bias, weights.shape)
    if mask is not None:
        weights = jnp.where(
            jnp.broadcast_to(mask, weights.shape), weights, jnp.finfo(weights.dtype).min
        )
    weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
    return jnp.einsum("bhst,bthd->bshd", weights, v)


def split_heads(x: Float[Array, "b s c"], heads: int) -> Float[Array, "b s h d"]:
    """Splits the channels into attention heads."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "b s h d"]) -> Float[Array, "b s c"]:
    """The inverse of `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
