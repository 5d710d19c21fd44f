"""T5 encoder-decoder: classic (ReLU, tied head) and v1.1 / Flan (gated GELU, own head).

Source: Raffel et al. 2020 (arXiv 1910.10683); names and numbers follow transformers' T5.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from agfsync_jax.models.attention import attention, merge_heads, split_heads
from agfsync_jax.models.layers import (
    ACTIVATIONS,
    Embed,
    Linear,
    ModelConfig,
    RMSNorm,
    initializer,
)


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """transformers' T5 `config.json`; `scale_decoder_outputs=False` means a head of its own."""

    ignored: ClassVar = {
        "dropout_rate": "this network drops nothing",
        "is_gated_act": "it follows from feed_forward_proj",
        "n_positions": "the positions are relative",
        "output_past": "generation always keeps keys and values",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    dense_act_fn: Literal[tuple(ACTIVATIONS)] | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0

    def __post_init__(self):
        if self.dense_act_fn is None:  # BLIP-2's Flan-T5 sets the exact gelu here
            name = {"relu": "relu", "gated-gelu": "gelu_new"}[self.feed_forward_proj]
            object.__setattr__(self, "dense_act_fn", name)
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        # transformers 5 always writes tie_word_embeddings=true and keeps the difference between
        # classic and v1.1 in scale_decoder_outputs; older files have tie_word_embeddings only.
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_word_embeddings)
        object.__setattr__(self, "tie_word_embeddings", True)  # as there: it means no more


def relative_position_buckets(
    length: int, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of every (query, key) distance, int32 [length, length] (Raffel et al., section 2.1).

    Half of the buckets are exact distances, the other half grow logarithmically.
    """
    position = np.arange(length)
    distance = position[None, :] - position[:, None]  # key - query
    buckets = np.zeros((length, length), np.int32)
    if bidirectional:
        num_buckets //= 2
        buckets += (distance > 0) * np.int32(num_buckets)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    max_exact = num_buckets // 2
    # float32 throughout, as torch: the logarithm is truncated and must land in the same bucket
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(max_exact)
    log_ratio = np.log(ratio) / np.float32(math.log(max_distance / max_exact))
    large = max_exact + (log_ratio * np.float32(num_buckets - max_exact)).astype(np.int32)
    large = np.minimum(large, num_buckets - 1)
    return (buckets + np.where(distance < max_exact, distance, large)).astype(np.int32)


def position_bias(
    table: nnx.Embed, length: int, *, bidirectional: bool, max_distance: int
) -> Float[Array, "1 heads s s"]:
    """The bias of the scores, from a table that has a row a bucket and a column a head."""
    buckets = relative_position_buckets(
        length,
        bidirectional=bidirectional,
        num_buckets=table.num_embeddings,
        max_distance=max_distance,
    )
    return jnp.transpose(table(jnp.asarray(buckets)), (2, 0, 1))[None]


def _norm(config: T5Config, **kwargs) -> nnx.RMSNorm:
    return RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, **kwargs)


def _linear(features_in: int, features_out: int, stddev: float, **kwargs) -> nnx.Linear:
    init = initializer(nnx.initializers.normal(stddev))
    return Linear(features_in, features_out, use_bias=False, kernel_init=init, **kwargs)


class T5Attention(nnx.Module):
    """Attention with neither biases nor scaling of the products; position enters as a bias."""

    def __init__(self, config: T5Config, *, has_relative_bias: bool = False, **kwargs):
        self.heads, width = config.num_heads, config.d_model
        inner = config.num_heads * config.d_kv
        self.q = _linear(width, inner, (width * config.d_kv) ** -0.5, **kwargs)
        self.k = _linear(width, inner, width**-0.5, **kwargs)
        self.v = _linear(width, inner, width**-0.5, **kwargs)
        self.o = _linear(inner, width, inner**-0.5, **kwargs)
        if has_relative_bias:
            self.relative_attention_bias = Embed(
                config.relative_attention_num_buckets,
                config.num_heads,
                embedding_init=initializer(nnx.initializers.normal(width**-0.5)),
                **kwargs,
            )

    def keys_values(self, states: Float[Array, "b s d_model"]) -> tuple[Array, Array]:
        return split_heads(self.k(states), self.heads), split_heads(self.v(states), self.heads)

    def __call__(self, states, keys_values, *, mask=None, bias=None) -> Float[Array, "b s d_model"]:
        query = split_heads(self.q(states), self.heads)
        out = attention(query, *keys_values, mask=mask, bias=bias, scale=1.0)
        return self.o(merge_heads(out))


class T5DenseReluDense(nnx.Module):
    """`wo(relu(wi x))`, or the gated form `wo(gelu(wi_0 x) * wi_1 x)`."""

    def __init__(self, config: T5Config, **kwargs):
        self.gated, self.act = config.feed_forward_proj == "gated-gelu", config.dense_act_fn
        width, hidden = config.d_model, config.d_ff
        if self.gated:
            self.wi_0 = _linear(width, hidden, width**-0.5, **kwargs)
            self.wi_1 = _linear(width, hidden, width**-0.5, **kwargs)
        else:
            self.wi = _linear(width, hidden, width**-0.5, **kwargs)
        self.wo = _linear(hidden, width, hidden**-0.5, **kwargs)

    def __call__(self, states: Float[Array, "b s d_model"]) -> Float[Array, "b s d_model"]:
        if self.gated:
            return self.wo(ACTIVATIONS[self.act](self.wi_0(states)) * self.wi_1(states))
        return self.wo(ACTIVATIONS[self.act](self.wi(states)))


class T5LayerSelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, has_relative_bias: bool, **kwargs):
        self.SelfAttention = T5Attention(config, has_relative_bias=has_relative_bias, **kwargs)
        self.layer_norm = _norm(config, **kwargs)

    def __call__(self, states, *, mask, bias):
        normed = self.layer_norm(states)
        keys_values = self.SelfAttention.keys_values(normed)
        return states + self.SelfAttention(normed, keys_values, mask=mask, bias=bias)

    def step(self, states, cache, index, *, mask, bias):
        """One position: `states` [b, 1, d]; returns (states, cache with keys/values at `index`)."""
        normed = self.layer_norm(states)
        new = self.SelfAttention.keys_values(normed)
        cache = tuple(
            lax.dynamic_update_slice_in_dim(old, now.astype(old.dtype), index, axis=1)
            for old, now in zip(cache, new, strict=True)
        )
        return states + self.SelfAttention(normed, cache, mask=mask, bias=bias), cache


class T5LayerCrossAttention(nnx.Module):
    def __init__(self, config: T5Config, **kwargs):
        self.EncDecAttention = T5Attention(config, **kwargs)
        self.layer_norm = _norm(config, **kwargs)

    def __call__(self, states, keys_values, *, mask):
        return states + self.EncDecAttention(self.layer_norm(states), keys_values, mask=mask)


class T5LayerFF(nnx.Module):
    def __init__(self, config: T5Config, **kwargs):
        self.DenseReluDense = T5DenseReluDense(config, **kwargs)
        self.layer_norm = _norm(config, **kwargs)

    def __call__(self, states):
        return states + self.DenseReluDense(self.layer_norm(states))


class T5Block(nnx.Module):
    """Self-attention, cross-attention (decoder only), feed-forward; each residual, pre-norm."""

    def __init__(self, config: T5Config, *, is_decoder: bool, has_relative_bias: bool, **kwargs):
        layers = [T5LayerSelfAttention(config, has_relative_bias=has_relative_bias, **kwargs)]
        if is_decoder:
            layers.append(T5LayerCrossAttention(config, **kwargs))
        layers.append(T5LayerFF(config, **kwargs))
        self.layer = nnx.List(layers)


class T5Stack(nnx.Module):
    """The blocks of one side; the first block's relative bias serves them all."""

    def __init__(self, config: T5Config, *, is_decoder: bool, **kwargs):
        self.is_decoder, self.max_distance = is_decoder, config.relative_attention_max_distance
        count = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nnx.List(
            [
                T5Block(config, is_decoder=is_decoder, has_relative_bias=index == 0, **kwargs)
                for index in range(count)
            ]
        )
        self.final_layer_norm = _norm(config, **kwargs)

    def position_bias(self, length: int) -> Float[Array, "1 heads s s"]:
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        bidirectional = not self.is_decoder
        return position_bias(
            table, length, bidirectional=bidirectional, max_distance=self.max_distance
        )

    def cross_keys_values(self, encoder_hidden) -> list[tuple[Array, Array]]:
        """Keys and values of the encoder's output, one pair a decoder block."""
        return [block.layer[1].EncDecAttention.keys_values(encoder_hidden) for block in self.block]


class T5ForConditionalGeneration(nnx.Module):
    """Encoder, decoder and vocabulary head over one shared embedding table.

    Compute is in `dtype`; parameters are float32, and so are logits. Initial weights have
    transformers' standard deviations.
    """

    config_class = T5Config
    # repeats of the shared table; a head of its own is a parameter and so is not ignored
    tied_keys = ((r"(encoder|decoder)\.embed_tokens\.weight", "shared.weight"),)
    ignored_keys = (
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    )

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        kwargs = {"dtype": dtype, "rngs": rngs}
        vocab_size, width = config.vocab_size, config.d_model
        init = initializer(nnx.initializers.normal(1.0))
        self.shared = Embed(vocab_size, width, embedding_init=init, **kwargs)
        self.encoder = T5Stack(config, is_decoder=False, **kwargs)
        self.decoder = T5Stack(config, is_decoder=True, **kwargs)
        if not config.scale_decoder_outputs:
            self.lm_head = _linear(width, vocab_size, 1.0, **kwargs)

    def encode(
        self, inputs_embeds: Float[Array, "b s d_model"], mask: Bool[Array, "b s"] | Int
    ) -> Float[Array, "b s d_model"]:
        """Encoder output for embedded inputs; `mask` is nonzero at the tokens to attend to."""
        states = inputs_embeds.astype(self.dtype)
        mask = mask.astype(bool)[:, None, None, :]
        bias = self.encoder.position_bias(states.shape[1])
        for block in self.encoder.block:
            attend, feed_forward = block.layer
            states = feed_forward(attend(states, mask=mask, bias=bias))
        return self.encoder.final_layer_norm(states)

    def decode(
        self,
        decoder_ids: Int[Array, "b t"],
        encoder_hidden: Float[Array, "b s d_model"],
        mask: Bool[Array, "b s"] | Int,
        *,
        parts: int = 1,
    ) -> Float[Array, "b t vocab"]:
        """Logits after each of `decoder_ids` (teacher forcing; ids start with the start token).

        With `parts`, a row is that many sequences of t / parts ids one after the other. They do not
        see each other, and share what is computed of the encoder's output.
        """
        length = decoder_ids.shape[1] // parts
        mask = mask.astype(bool)[:, None, None, :]
        causal = jnp.kron(jnp.eye(parts), jnp.tril(jnp.ones((length, length))))
        causal = causal.astype(bool)[None, None]
        bias = jnp.tile(self.decoder.position_bias(length), (1, 1, parts, parts))
        states = self.shared(decoder_ids)
        cross = self.decoder.cross_keys_values(encoder_hidden)
        for block, keys_values in zip(self.decoder.block, cross, strict=True):
            attend, cross_attend, feed_forward = block.layer
            states = attend(states, mask=causal, bias=bias)
            states = feed_forward(cross_attend(states, keys_values, mask=mask))
        return self.logits(states)

    def logits(self, states: Float[Array, "b t d_model"]) -> Float[Array, "b t vocab"]:
        states = self.decoder.final_layer_norm(states)
        if self.config.scale_decoder_outputs:  # classic T5: the head is the embedding table
            return self.shared.attend(states * self.config.d_model**-0.5).astype(jnp.float32)
        return self.lm_head(states).astype(jnp.float32)

    def __call__(self, input_ids, attention_mask, decoder_ids) -> Float[Array, "b t vocab"]:
        """Logits for token ids [b, s], their mask [b, s] and decoder ids [b, t]."""
        encoder_hidden = self.encode(self.shared(input_ids), attention_mask)
        return self.decode(decoder_ids, encoder_hidden, attention_mask)

    def generate(
        self,
        encoder_hidden: Float[Array, "b s d_model"],
        mask: Bool[Array, "b s"] | Int,
        max_new_tokens: int,
    ) -> Int[Array, "b max_new_tokens"]:
        """Greedy decoding with a key/value cache; stops early once every row has ended.

        Returns the new tokens without the start token, pad_token_id after the first eos_token_id.
        `max_new_tokens` is static: one compilation each.
        """
        config, batch = self.config, encoder_hidden.shape[0]
        mask = mask.astype(bool)[:, None, None, :]
        bias = self.decoder.position_bias(max_new_tokens)
        cross = self.decoder.cross_keys_values(encoder_hidden)
        cache_shape = (batch, max_new_tokens, config.num_heads, config.d_kv)
        empty = jnp.zeros(cache_shape, self.dtype)

        def unfinished(carry):
            index, _, _, done, _ = carry
            return (index < max_new_tokens) & ~done.all()

        def step(carry):
            index, token, caches, done, output = carry
            states = self.shared(token[:, None])  # [b, 1, d_model]
            seen = (jnp.arange(max_new_tokens) <= index)[None, None, None, :]
            row = lax.dynamic_slice_in_dim(bias, index, 1, axis=2)
            updated = []
            for block, cache, keys_values in zip(self.decoder.block, caches, cross, strict=True):
                attend, cross_attend, feed_forward = block.layer
                states, cache = attend.step(states, cache, index, mask=seen, bias=row)
                states = feed_forward(cross_attend(states, keys_values, mask=mask))
                updated.append(cache)
            token = jnp.argmax(self.logits(states)[:, 0], axis=-1).astype(jnp.int32)
            token = jnp.where(done, config.pad_token_id, token)
            output = lax.dynamic_update_slice_in_dim(output, token[:, None], index, axis=1)
            return index + 1, token, updated, done | (token == config.eos_token_id), output

        carry = (
            jnp.int32(0),
            jnp.full(batch, config.decoder_start_token_id, jnp.int32),
            [(empty, empty)] * config.num_decoder_layers,
            jnp.zeros(batch, bool),
            jnp.full((batch, max_new_tokens), config.pad_token_id, jnp.int32),
        )
        return jax.lax.while_loop(unfinished, step, carry)[-1]
