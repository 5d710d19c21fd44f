"""MPNet's encoder of texts, in the layout of transformers' MPNetModel.

Source: Song et al. 2020 (arXiv 2004.09297). The blocks are BERT's, with T5's relative positions as
a bias of the attention.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from agfsync_jax.models.attention import multi_head
from agfsync_jax.models.bert import BertIntermediate, BertModel, BertOutput
from agfsync_jax.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, ModelConfig
from agfsync_jax.models.t5 import position_bias

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


class MPNetEmbeddings(nnx.Module):
    """Token and position embeddings; positions count the tokens that are no padding."""

    def __init__(self, config: MPNetConfig, **kwargs):
        width = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, width, **kwargs)
        self.position_embeddings = Embed(config.max_position_embeddings, width, **kwargs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        is_token = (input_ids != _PADDING).astype(jnp.int32)
        positions = jnp.cumsum(is_token, axis=1) * is_token + _PADDING
        return self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions))


class MPNetSelfAttention(nnx.Module):
    """Multi-head self-attention with a bias of the scores."""

    def __init__(self, config: MPNetConfig, **kwargs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q = Linear(width, width, **kwargs)
        self.k = Linear(width, width, **kwargs)
        self.v = Linear(width, width, **kwargs)
        self.o = Linear(width, width, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(multi_head(q, k, v, self.heads, mask=mask, bias=bias))


class MPNetAttention(nnx.Module):
    """Attention, its residual, then the norm."""

    def __init__(self, config: MPNetConfig, **kwargs):
        self.attn = MPNetSelfAttention(config, **kwargs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        return self.LayerNorm(x + self.attn(x, mask=mask, bias=bias))


class MPNetLayer(nnx.Module):
    """A post-norm transformer block."""

    def __init__(self, config: MPNetConfig, **kwargs):
        self.attention = MPNetAttention(config, **kwargs)
        self.intermediate = BertIntermediate(config, **kwargs)
        self.output = BertOutput(config, config.intermediate_size, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask, bias) -> Float[Array, "b n d"]:
        x = self.attention(x, mask=mask, bias=bias)
        return self.output(self.intermediate(x), x)


class MPNetEncoder(nnx.Module):
    """The stack of blocks; one table of relative positions serves them all."""

    def __init__(self, config: MPNetConfig, **kwargs):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([MPNetLayer(config, **kwargs) for _ in layers])
        self.relative_attention_bias = Embed(_BUCKETS, config.num_attention_heads, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask) -> Float[Array, "b n d"]:
        bias = position_bias(
            self.relative_attention_bias, x.shape[1], bidirectional=True, max_distance=_MAX_DISTANCE
        )
        for layer in self.layer:
            x = layer(x, mask=mask, bias=bias)
        return x


class MPNetModel(BertModel):
    """The encoder without its pooler; see `BertModel`."""

    config_class = MPNetConfig
    parts = (MPNetEmbeddings, MPNetEncoder)
