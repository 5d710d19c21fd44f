"""MPNet's encoder of texts, in the layout of transformers' MPNetModel.

Source: Song et al. 2020 (arXiv 2004.09297). The blocks are BERT's, with T5's relative positions as
a bias of the attention.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from agfsync_jax.models.attention import attention, merge_heads, split_heads
from agfsync_jax.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, ModelConfig
from agfsync_jax.models.t5 import relative_position_buckets

_PADDING = 1  # the padding token's id, and its position
_BUCKETS, _MAX_DISTANCE = 32, 128  # of the relative positions


@dataclasses.dataclass(frozen=True)
class MPNetConfig(ModelConfig):
    """config.json of an MPNetModel."""

    # transformers' own code writes these two as numbers
    fixed: ClassVar = {"pad_token_id": (_PADDING,), "relative_attention_num_buckets": (_BUCKETS,)}
    ignored: ClassVar = {"attention_probs_dropout_prob": "this network drops nothing"}

    vocab_size: int = 30527
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu"
    layer_norm_eps: float = 1e-12

    @property
    def max_length(self) -> int:
        """Tokens of the longest text: positions begin after that of the padding."""
        return self.max_position_embeddings - _PADDING - 1


def _norm(config: MPNetConfig, *, dtype, rngs) -> nnx.LayerNorm:
    return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)


class MPNetEmbeddings(nnx.Module):
    """Token and position embeddings; positions count the tokens that are no padding."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        width = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position_embeddings = Embed(
            config.max_position_embeddings, width, dtype=dtype, rngs=rngs
        )
        self.LayerNorm = _norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        is_token = (input_ids != _PADDING).astype(jnp.int32)
        positions = jnp.cumsum(is_token, axis=1) * is_token + _PADDING
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))


class MPNetSelfAttention(nnx.Module):
    """Multi-head self-attention with a bias of the scores."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q = Linear(width, width, dtype=dtype, rngs=rngs)
        self.k = Linear(width, width, dtype=dtype, rngs=rngs)
        self.v = Linear(width, width, dtype=dtype, rngs=rngs)
        self.o = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        return self.o(merge_heads(attention(q, k, v, mask=mask, bias=bias)))


class MPNetAttention(nnx.Module):
    """Attention, its residual, then the norm."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        self.attn = MPNetSelfAttention(config, dtype=dtype, rngs=rngs)
        self.LayerNorm = _norm(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        return self.LayerNorm(x + self.attn(x, mask=mask, bias=bias))


class MPNetIntermediate(nnx.Module):
    """The wide half of a block's MLP."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        self.activation = config.hidden_act
        self.dense = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
        return ACTIVATIONS[self.activation](self.dense(x))


class MPNetOutput(nnx.Module):
    """The narrow half of a block's MLP, its residual, then the norm."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        self.dense = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.LayerNorm = _norm(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n m"], residual: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        return self.LayerNorm(self.dense(x) + residual)


class MPNetLayer(nnx.Module):
    """A post-norm transformer block."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        self.attention = MPNetAttention(config, dtype=dtype, rngs=rngs)
        self.intermediate = MPNetIntermediate(config, dtype=dtype, rngs=rngs)
        self.output = MPNetOutput(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        x = self.attention(x, mask=mask, bias=bias)
        return self.output(self.intermediate(x), x)


class MPNetEncoder(nnx.Module):
    """The stack of blocks; one table of relative positions serves them all."""

    def __init__(self, config: MPNetConfig, *, dtype, rngs):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([MPNetLayer(config, dtype=dtype, rngs=rngs) for _ in layers])
        self.relative_attention_bias = Embed(
            _BUCKETS, config.num_attention_heads, dtype=dtype, rngs=rngs
        )

    def position_bias(self, length: int) -> Float[Array, "1 heads n n"]:
        buckets = relative_position_buckets(
            length, bidirectional=True, num_buckets=_BUCKETS, max_distance=_MAX_DISTANCE
        )
        return jnp.transpose(self.relative_attention_bias(jnp.asarray(buckets)), (2, 0, 1))[None]

    def __call__(self, x: Float[Array, "b n d"], *, mask) -> Float[Array, "b n d"]:
        bias = self.position_bias(x.shape[1])
        for layer in self.layer:
            x = layer(x, mask=mask, bias=bias)
        return x


class MPNetModel(nnx.Module):
    """The encoder without its pooler, which sentence encoders leave unused.

    Args:
        config: sizes, in transformers' words.
        rngs: for the initial weights.
        dtype: of the computation; parameters are float32.
    """

    config_class = MPNetConfig
    ignored_keys = (r"embeddings\.position_ids", r"pooler\..*")

    def __init__(self, config: MPNetConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.embeddings = MPNetEmbeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = MPNetEncoder(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, input_ids: Int[Array, "b n"], attention_mask: Bool[Array, "b n"] | Int
    ) -> Float[Array, "b n d"]:
        """The last hidden states; `attention_mask` is nonzero at the tokens to attend to.

        Raises:
            ValueError: more tokens than there are positions.
        """
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"texts of {input_ids.shape[1]} tokens: this MPNet takes {self.config.max_length}"
                " at most, so cut them."
            )
        mask = attention_mask.astype(bool)[:, None, None, :]
        return self.encoder(self.embeddings(input_ids), mask=mask)
