"""BERT's encoder of texts, in the layout of transformers' BertModel.

Source: Devlin et al. 2019 (arXiv 1810.04805). The parts of its blocks are also those of MPNet and
of BLIP-2's Q-Former.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from agfsync_jax.models.attention import multi_head
from agfsync_jax.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, ModelConfig


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """config.json of a BertModel."""

    fixed: ClassVar = {"position_embedding_type": ("absolute",)}
    ignored: ClassVar = {
        "attention_probs_dropout_prob": "this network drops nothing",
        "gradient_checkpointing": "the outcome is the same",
    }

    vocab_size: int = 30522
    type_vocab_size: int = 2
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu"
    layer_norm_eps: float = 1e-12

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self.max_position_embeddings


class BertEmbeddings(nnx.Module):
    """Token and position embeddings; of the two kinds of token, all are of the first."""

    def __init__(self, config: BertConfig, **kwargs):
        width = config.hidden_size
        self.word_embeddings = Embed(config.vocab_size, width, **kwargs)
        self.position_embeddings = Embed(config.max_position_embeddings, width, **kwargs)
        self.token_type_embeddings = Embed(config.type_vocab_size, width, **kwargs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        positions = self.position_embeddings(jnp.arange(input_ids.shape[1])[None])
        kinds = self.token_type_embeddings(jnp.zeros((1, 1), jnp.int32))
        return self.LayerNorm(self.word_embeddings(input_ids) + kinds + positions)


class BertSelfAttention(nnx.Module):
    """Multi-head attention, to states of `key_size`, without the projection after it."""

    def __init__(self, config: ModelConfig, key_size: int, **kwargs):
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        self.query = Linear(width, width, **kwargs)
        self.key = Linear(key_size, width, **kwargs)
        self.value = Linear(key_size, width, **kwargs)

    def __call__(
        self, states: Float[Array, "b s d"], source: Float[Array, "b k e"], *, mask=None
    ) -> Float[Array, "b s d"]:
        q, k, v = self.query(states), self.key(source), self.value(source)
        return multi_head(q, k, v, self.num_heads, mask=mask)


class BertIntermediate(nnx.Module):
    """The wide half of a block's MLP."""

    def __init__(self, config: ModelConfig, **kwargs):
        self.activation = config.hidden_act
        self.dense = Linear(config.hidden_size, config.intermediate_size, **kwargs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
        return ACTIVATIONS[self.activation](self.dense(x))


class BertOutput(nnx.Module):
    """A projection to the block's width, its residual, then the norm."""

    def __init__(self, config: ModelConfig, features_in: int, **kwargs):
        self.dense = Linear(features_in, config.hidden_size, **kwargs)
        self.LayerNorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(
        self, x: Float[Array, "b n m"], residual: Float[Array, "b n d"]
    ) -> Float[Array, "b n d"]:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nnx.Module):
    """Self-attention, its residual, then the norm."""

    def __init__(self, config: BertConfig, **kwargs):
        self.self = BertSelfAttention(config, config.hidden_size, **kwargs)
        self.output = BertOutput(config, config.hidden_size, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask) -> Float[Array, "b n d"]:
        return self.output(self.self(x, x, mask=mask), x)


class BertLayer(nnx.Module):
    """A post-norm transformer block."""

    def __init__(self, config: BertConfig, **kwargs):
        self.attention = BertAttention(config, **kwargs)
        self.intermediate = BertIntermediate(config, **kwargs)
        self.output = BertOutput(config, config.intermediate_size, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], *, mask) -> Float[Array, "b n d"]:
        x = self.attention(x, mask=mask)
        return self.output(self.intermediate(x), x)


class BertEncoder(nnx.Module):
    """The stack of blocks."""

    def __init__(self, config: BertConfig, **kwargs):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([BertLayer(config, **kwargs) for _ in layers])

    def __call__(self, x: Float[Array, "b n d"], *, mask) -> Float[Array, "b n d"]:
        for layer in self.layer:
            x = layer(x, mask=mask)
        return x


class BertModel(nnx.Module):
    """The encoder without its pooler, which sentence encoders leave unused.

    Compute is in `dtype`, parameters are float32.
    """

    config_class = BertConfig
    parts = (BertEmbeddings, BertEncoder)
    ignored_keys = (r"embeddings\.position_ids", r"pooler\..*")

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        kwargs = {"dtype": dtype, "rngs": rngs}
        embeddings, encoder = self.parts
        self.embeddings = embeddings(config, **kwargs)
        self.encoder = encoder(config, **kwargs)

    def __call__(
        self, input_ids: Int[Array, "b n"], attention_mask: Bool[Array, "b n"] | Int
    ) -> Float[Array, "b n d"]:
        """The last hidden states; `attention_mask` is nonzero at the tokens to attend to.

        Raises:
            ValueError: more tokens than there are positions.
        """
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"texts of {input_ids.shape[1]} tokens: this network takes {self.config.max_length}"
                " at most, so cut them."
            )
        mask = attention_mask.astype(bool)[:, None, None, :]
        return self.encoder(self.embeddings(input_ids), mask=mask)
