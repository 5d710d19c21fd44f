"""What the networks are made of: the config base class, layers, blocks of several, activations.

The `**kwargs` that blocks hand on to layers are `dtype`, of the computation, and `rngs`, for the
initial weights.
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from agfsync_jax.models import hooks
from agfsync_jax.models.lora import Branched

# What of a block is kept for its gradient; the rest is computed again (arXiv:1604.06174).
REMAT = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # only what goes into a block
}
# The policy of `rematerialized`; as in hooks.py, a part of JAX's caches' keys.
_REMAT = jax.make_user_context("none")

# Bookkeeping and generation settings that save_pretrained writes into every config.json, nested
# ones included, and that change no computation. Dropout too: these networks drop nothing.
BOOKKEEPING = frozenset(
    """architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout decoder_start_token_id diversity_penalty
    do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    hidden_dropout_prob id2label initializer_factor initializer_range is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache""".split()
)
# Fields of the same origin that would change a network, were they anything else.
USUAL = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}
_WORDS = {
    bool: "`true` or `false`",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "`null`",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a parsed JSON value is of an annotated type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, parts[0]) for each in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, int | float if kind is float else kind)


def in_json(values: Iterable) -> str:
    """Values as config.json spells them, in Markdown."""
    return " or ".join(f"`{json.dumps(value)}`" for value in values)


def _describe(kind: Any) -> str:
    """An annotated type in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in parts)
    if origin is typing.Literal:
        return in_json(parts)
    if origin is tuple:
        return f"a list, each {_describe(parts[0])}"
    return _WORDS.get(kind) or f"an object, see {kind.__name__}"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A network's config.json in Hugging Face's words.

    A subclass lists the fields it honors, annotated with the values it takes. `fixed` holds the
    fields that the network supports with certain values only (field -> the supported values),
    `ignored` those that change no computation here (field -> why).
    """

    fixed: ClassVar[dict[str, tuple]] = {}
    ignored: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds the config from a parsed config.json, and the configs in it from theirs.

        Raises:
          ValueError: fields that are not supported, all of them listed.
        """
        known, wrong = {}, []
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        fixed = USUAL | cls.fixed
        for name, value in values.items():
            if name in kinds:
                kind = kinds[name]
                if isinstance(kind, type) and issubclass(kind, ModelConfig):
                    value = kind.from_dict(value or {})
                known[name] = tuple(value) if isinstance(value, list) else value
                if not _fits(value, kind):
                    wrong.append(f"{name}={value!r} (supported: {_describe(kind)})")
            elif name in fixed:
                if value not in fixed[name]:
                    supported = " or ".join(repr(option) for option in fixed[name])
                    wrong.append(f"{name}={value!r} (supported: {supported})")
            elif not name.startswith("_") and name not in BOOKKEEPING | cls.ignored.keys():
                wrong.append(f"{name}={value!r} (unknown field)")
        if wrong:
            raise ValueError(
                f"{cls.__name__}: fields of config.json that are not supported: {'; '.join(wrong)}."
            )
        return cls(**known)

    def check_levels(self, *fields: str) -> None:
        """Raises ValueError unless each field is one number or has one of each resolution level."""
        levels = len(self.block_out_channels)
        for field in fields:
            each = getattr(self, field)
            if not isinstance(each, int) and len(each) != levels:
                raise ValueError(
                    f"{type(self).__name__}: {field}={list(each)} is not supported: one is needed "
                    f"for each of the {levels} block_out_channels."
                )

    @classmethod
    def support(cls) -> Iterator[tuple[str, str, str, str]]:
        """Every field of this network's own: (name, support, values, default), in Markdown.

        Those of `USUAL` and `BOOKKEEPING`, which all networks know, are left out.
        """
        for field in dataclasses.fields(cls):
            nested = isinstance(field.default, ModelConfig)
            default = "" if nested else in_json([field.default])
            yield field.name, "honored", _describe(field.type), default
        for name, values in cls.fixed.items():
            yield name, "only these values", in_json(values), ""
        for name, why in cls.ignored.items():
            yield name, "no effect", why, ""


def initializer(init: Callable) -> Callable:
    """`init(key, shape, dtype)`, which gives the shape alone where there is no key."""

    def initialize(key, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else init(key, shape, dtype)

    return initialize


def _product(
    function: Callable, x: Array, kernel: Array | Branched, *args: Any, **kwargs: Any
) -> Array:
    """A layer's product of activations and weights, each as the hooks want it."""
    hook = hooks.current()
    x = hook.activations(x)
    if not isinstance(kernel, Branched):
        return hook.activations(function(x, hook.weights(kernel), *args, **kwargs))
    wide = {"preferred_element_type": jnp.float32}  # the adapter's part would be lost in a rounding
    out = function(x, hook.weights(kernel.kernel), *args, **kwargs | wide)
    low = function(kernel.drop(x), kernel.A, *args, **kwargs)
    out += jnp.tensordot(low, kernel.B, axes=1, **wide)
    return hook.activations(out.astype(x.dtype))


def _promote(args: tuple, *, dtype: Any = None, inexact: bool = True) -> tuple:
    """nnx's own for (inputs, kernel, bias), whose kernel may have an adapter."""
    inputs, kernel, bias = args
    if not isinstance(kernel, Branched):
        return promote_dtype(args, dtype=dtype, inexact=inexact)
    parts = inputs, kernel.kernel, kernel.A, kernel.B, bias
    inputs, weights, a, b, bias = promote_dtype(parts, dtype=dtype, inexact=inexact)
    return inputs, dataclasses.replace(kernel, kernel=weights, A=a, B=b), bias


# One object each: what holds them compares equal.
_ZEROS = initializer(nnx.initializers.zeros)
_ONES = initializer(nnx.initializers.ones)
_FAN_IN = initializer(nnx.initializers.lecun_normal())
_EMBEDDING = initializer(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
_dot_general = functools.partial(_product, jax.lax.dot_general)
_conv_general_dilated = functools.partial(_product, jax.lax.conv_general_dilated)

# A layer's initializers, if others, are made by `initializer`.
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5, bias_init=_ZEROS, scale_init=_ONES)
RMSNorm = functools.partial(nnx.RMSNorm, scale_init=_ONES)
Embed = functools.partial(nnx.Embed, embedding_init=_EMBEDDING)
Linear = functools.partial(
    nnx.Linear,
    kernel_init=_FAN_IN,
    bias_init=_ZEROS,
    dot_general=_dot_general,
    promote_dtype=_promote,
)


def Conv(  # noqa: N802 - reads as the layer it makes
    features_in: int, features_out: int, kernel: int = 3, *, stride: int = 1, padding=None, **kwargs
) -> nnx.Conv:
    """A 2D convolution over [b, h, w, c].

    `padding` is ((top, bottom), (left, right)) and keeps the size by default.
    """
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((kernel // 2, kernel // 2),) * 2 if padding is None else padding,
        kernel_init=_FAN_IN,
        bias_init=_ZEROS,
        conv_general_dilated=_conv_general_dilated,
        promote_dtype=_promote,
        **kwargs,
    )


def param(init: Callable, shape: tuple[int, ...], *, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter of a network's own."""
    return nnx.Param(initializer(init)(rngs.params(), shape))


class GroupNorm(nnx.Module):
    """Group normalization over [b, h, w, c] (Wu & He 2018); statistics in float32, in one pass.

    They are those of what is left of each channel without its first pixel: of squares of the pixels
    themselves little but roundings would be left where the mean is far larger than the deviation.
    """

    def __init__(self, channels: int, groups: int, epsilon: float, *, dtype=jnp.float32, rngs):
        if channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {groups} groups.")
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = param(_ONES, (channels,), rngs=rngs)
        self.bias = param(_ZEROS, (channels,), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        pixels = x.reshape(b, h * w, c).astype(jnp.float32)

        def group_mean(values):  # [b, c] -> [b, c], equal within a group
            means = values.reshape(b, self.groups, -1).mean(axis=-1)
            return jnp.repeat(means, c // self.groups, axis=1)

        first = jax.lax.stop_gradient(pixels[:, :1])  # the outcome does not depend on it
        rest = pixels - first
        mean, square = rest.mean(axis=1), jnp.square(rest).mean(axis=1)
        own = jnp.maximum(square - jnp.square(mean), 0)  # a channel's variance
        mean += first[:, 0]
        between = mean - group_mean(mean)
        mean, variance = group_mean(mean), group_mean(own + jnp.square(between))
        # One multiply-add an element: the statistics fold into a scale and a shift a channel.
        scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...][None]
        shift = self.bias[...][None] - mean * scale
        return (pixels * scale[:, None] + shift[:, None]).reshape(x.shape).astype(self.dtype)


class Upsample2D(nnx.Module):
    """Nearest-neighbor doubling, then a convolution."""

    def __init__(self, channels: int, **kwargs):
        self.conv = Conv(channels, channels, **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h*2 w*2 c"]:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class Downsample2D(nnx.Module):
    """A strided convolution; `padding` is (before, after), of each axis."""

    def __init__(self, channels: int, padding: tuple[int, int], **kwargs):
        self.conv = Conv(channels, channels, stride=2, padding=(padding, padding), **kwargs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        return self.conv(x)


class ResnetBlock2D(nnx.Module):
    """Norm, SiLU, conv twice, with the timestep added between them where it has a width.

    A 1x1 convolution is the shortcut where the number of channels changes.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        groups: int,
        epsilon: float,
        time_width: int | None = None,
        **kwargs,
    ):
        self.norm1 = GroupNorm(features_in, groups, epsilon, **kwargs)
        self.conv1 = Conv(features_in, features_out, **kwargs)
        if time_width:
            self.time_emb_proj = Linear(time_width, features_out, **kwargs)
        self.norm2 = GroupNorm(features_out, groups, epsilon, **kwargs)
        self.conv2 = Conv(features_out, features_out, **kwargs)
        if features_in != features_out:
            self.conv_shortcut = Conv(features_in, features_out, 1, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


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


def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of length one, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def rematerialized(policy: str) -> AbstractContextManager:
    """Makes every `checkpointed` block that is traced inside, in this thread, keep less.

    Raises:
      ValueError: no key of `REMAT`.
    """
    if policy not in REMAT:
        raise ValueError(f"remat is {policy!r}, expected one of {', '.join(REMAT)}")
    return _REMAT(policy)


def checkpointed(module: Callable[..., Any], *args: Any) -> Any:
    """`module(*args)`; for its gradient it is run again as far as `rematerialized` says."""
    policy = REMAT[_REMAT.value]
    if policy is None:
        return module(*args)
    return jax.checkpoint(lambda *args: module(*args), policy=policy)(*args)


def stacked(modules: Sequence[nnx.Module], x: Array, *args: Any) -> Array:
    """`x` through modules that are alike, each `module(x, *args)`, as `checkpointed`.

    Where blocks are rematerialized it is a loop over their stacked parameters: a program of one
    block instead of ten, whose weights are taken up (`hooks.weights`) when it is their turn. The
    stack is a copy, for which sampling, that keeps nothing for a gradient, would have no use.
    """
    policy = REMAT[_REMAT.value]
    if policy is None or len(modules) == 1:
        for module in modules:
            x = checkpointed(module, x, *args)
        return x
    graph, _ = nnx.split(modules[0])
    states = [nnx.split(module)[1] for module in modules]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def block(x, state):
        return nnx.merge(graph, state)(x, *args), None

    return jax.lax.scan(block, x, states)[0]
