"""BLIP-2 for visual question answering: ViT, Q-Former, projection, T5.

Source: Li et al. 2023 (arXiv 2301.12597); names and numbers follow transformers' Blip2.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from agfsync_jax.models.attention import attention, merge_heads
from agfsync_jax.models.bert import BertIntermediate, BertOutput, BertSelfAttention
from agfsync_jax.models.clip import CLIPEncoder
from agfsync_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    LayerNorm,
    Linear,
    ModelConfig,
    param,
)
from agfsync_jax.models.t5 import T5Config, T5ForConditionalGeneration


@dataclasses.dataclass(frozen=True)
class Blip2VisionConfig(ModelConfig):
    """`vision_config` of a BLIP-2."""

    fixed: ClassVar = {"num_channels": (3,)}
    ignored: ClassVar = {"projection_dim": "the vision model has no projection"}

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Blip2QFormerConfig(ModelConfig):
    """`qformer_config` of a BLIP-2."""

    fixed: ClassVar = {"use_qformer_text_input": (False,), "position_embedding_type": ("absolute",)}
    ignored: ClassVar = {
        "attention_probs_dropout_prob": "this network drops nothing",
        "max_position_embeddings": "only image-text retrieval gives the Q-Former text",
        "vocab_size": "only image-text retrieval gives the Q-Former text",
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408


@dataclasses.dataclass(frozen=True)
class Blip2Config(ModelConfig):
    """transformers' BLIP-2 `config.json`, with a T5 text model."""

    fixed: ClassVar = {"use_decoder_only_language_model": (False,)}
    ignored: ClassVar = {"image_text_hidden_size": "only image-text retrieval has this layer"}

    vision_config: Blip2VisionConfig = Blip2VisionConfig()
    qformer_config: Blip2QFormerConfig = Blip2QFormerConfig()
    text_config: T5Config = T5Config()
    num_query_tokens: int = 32
    image_token_index: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Blip2Config":
        """As `ModelConfig.from_dict`.

        Raises:
            ValueError: a text model other than T5, or fields that are not supported.
        """
        text_type = values.get("text_config", {}).get("model_type")
        if text_type != "t5":
            raise ValueError(
                f"BLIP-2 with text_config.model_type={text_type!r} is not supported; use one whose "
                "text model is 't5' (blip2-flan-t5-xl, blip2-flan-t5-xxl)"
            )
        width = values.get("vision_config", {}).get("hidden_size", Blip2VisionConfig.hidden_size)
        qformer = values.get("qformer_config", {}) | {"encoder_hidden_size": width}
        return super().from_dict(values | {"qformer_config": qformer})


class Blip2VisionEmbeddings(nnx.Module):
    """Patches, a class token before them, learned positions."""

    def __init__(self, config: Blip2VisionConfig, *, dtype, rngs):
        self.dtype = dtype
        patch, width = config.patch_size, config.hidden_size
        num_positions = (config.image_size // patch) ** 2 + 1
        init = nnx.initializers.truncated_normal(0.02)
        self.class_embedding = param(init, (1, 1, width), rngs=rngs)
        self.position_embedding = param(init, (1, num_positions, width), rngs=rngs)
        self.patch_embedding = Conv(
            3, width, patch, stride=patch, padding=((0, 0), (0, 0)), dtype=dtype, rngs=rngs
        )

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        patches = self.patch_embedding(pixel_values.astype(self.dtype))
        batch, _, _, width = patches.shape
        patches = patches.reshape(batch, -1, width)  # row-major, as torch flattens
        cls = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (batch, 1, width))
        positions = self.position_embedding[...].astype(self.dtype)
        return jnp.concatenate([cls, patches], axis=1) + positions


class Blip2Attention(nnx.Module):
    """Multi-head self-attention whose three projections are one."""

    def __init__(self, config: Blip2VisionConfig, **kwargs):
        self.num_heads, width = config.num_attention_heads, config.hidden_size
        self.qkv = Linear(width, 3 * width, use_bias=config.qkv_bias, **kwargs)
        self.projection = Linear(width, width, **kwargs)

    def __call__(self, states: Float[Array, "b s d"], mask: Array | None) -> Float[Array, "b s d"]:
        batch, length, _ = states.shape
        qkv = self.qkv(states).reshape(batch, length, 3, self.num_heads, -1)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask=mask)
        return self.projection(merge_heads(out))


class Blip2VisionModel(nnx.Module):
    """Image [b, h, w, 3] to one state a patch and one for the class token, [b, s, d]."""

    def __init__(self, config: Blip2VisionConfig, **kwargs):
        self.image_size = config.image_size
        self.embeddings = Blip2VisionEmbeddings(config, **kwargs)
        self.encoder = CLIPEncoder(config, Blip2Attention, **kwargs)
        self.post_layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        expected = (self.image_size, self.image_size, 3)
        if pixel_values.shape[1:] != expected:
            raise ValueError(
                f"pixel_values are {pixel_values.shape[1:]}, the vision model takes {expected}: "
                "resize the images first"
            )
        states, _ = self.encoder(self.embeddings(pixel_values))
        return self.post_layernorm(states)


class Blip2QFormerAttention(nnx.Module):
    def __init__(self, config: Blip2QFormerConfig, key_size: int, **kwargs):
        self.attention = BertSelfAttention(config, key_size, **kwargs)
        self.output = BertOutput(config, config.hidden_size, **kwargs)

    def __call__(self, states, source):
        return self.output(self.attention(states, source), states)


class Blip2QFormerLayer(nnx.Module):
    """Self-attention of the queries, cross-attention to the image in some layers, feed-forward."""

    def __init__(self, config: Blip2QFormerConfig, index: int, **kwargs):
        self.has_cross_attention = index % config.cross_attention_frequency == 0
        width = config.hidden_size
        self.attention = Blip2QFormerAttention(config, width, **kwargs)
        if self.has_cross_attention:
            image_width = config.encoder_hidden_size
            self.crossattention = Blip2QFormerAttention(config, image_width, **kwargs)
        self.intermediate_query = BertIntermediate(config, **kwargs)
        self.output_query = BertOutput(config, config.intermediate_size, **kwargs)

    def __call__(self, states, image_states):
        states = self.attention(states, states)
        if self.has_cross_attention:
            states = self.crossattention(states, image_states)
        return self.output_query(self.intermediate_query(states), states)


class Blip2QFormerEncoder(nnx.Module):
    def __init__(self, config: Blip2QFormerConfig, **kwargs):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([Blip2QFormerLayer(config, index, **kwargs) for index in layers])

    def __call__(self, states, image_states):
        for layer in self.layer:
            states = layer(states, image_states)
        return states


class Blip2QFormerModel(nnx.Module):
    """Learned queries [b, n, d] that read the image states [b, s, e] into [b, n, d]."""

    def __init__(self, config: Blip2QFormerConfig, **kwargs):
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **kwargs)
        self.encoder = Blip2QFormerEncoder(config, **kwargs)

    def __call__(self, query_embeds, image_states):
        return self.encoder(self.layernorm(query_embeds), image_states)


class Blip2ForConditionalGeneration(nnx.Module):
    """Answers questions about images.

    An image is read once (`get_image_tokens`); every question about it reuses its tokens
    (`encode`, then `decode` or `generate`). Compute is in `dtype`, parameters are float32.
    """

    config_class = Blip2Config
    tied_keys = tuple(
        (rf"language_model\.{pattern}", f"language_model.{key}")
        for pattern, key in T5ForConditionalGeneration.tied_keys
    )
    ignored_keys = (
        *(rf"language_model\.{key}" for key in T5ForConditionalGeneration.ignored_keys),
        # the text side of the Q-Former, which only image-text retrieval reads
        r"(qformer\.)?embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    )

    def __init__(self, config: Blip2Config, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        kwargs = {"dtype": dtype, "rngs": rngs}
        qformer_size = config.qformer_config.hidden_size
        # not zeros as in transformers, where identical queries could never learn to differ
        queries = (1, config.num_query_tokens, qformer_size)
        self.query_tokens = param(nnx.initializers.normal(0.02), queries, rngs=rngs)
        self.vision_model = Blip2VisionModel(config.vision_config, **kwargs)
        self.qformer = Blip2QFormerModel(config.qformer_config, **kwargs)
        self.language_projection = Linear(qformer_size, config.text_config.d_model, **kwargs)
        self.language_model = T5ForConditionalGeneration(config.text_config, **kwargs)

    def get_image_tokens(
        self, pixel_values: Float[Array, "b h w 3"]
    ) -> Float[Array, "b num_query_tokens d_model"]:
        """Normalized pixels to the tokens that the language model reads in the image's place."""
        image_states = self.vision_model(pixel_values)
        queries = self.query_tokens[...].astype(self.dtype)
        queries = jnp.broadcast_to(queries, (pixel_values.shape[0], *queries.shape[1:]))
        return self.language_projection(self.qformer(queries, image_states))

    def encode(
        self,
        image_tokens: Float[Array, "b n d_model"],
        input_ids: Int[Array, "b s"],
        attention_mask: Int[Array, "b s"],
    ) -> tuple[Float[Array, "b n+s d_model"], Int[Array, "b n+s"]]:
        """Encoder states and mask of image tokens followed by the text.

        `input_ids` is the text alone. transformers' processor puts `num_query_tokens`
        placeholders before it and fills in the image tokens there, which is the same sequence.
        """
        text = self.language_model.shared(input_ids)
        embeds = jnp.concatenate([image_tokens.astype(text.dtype), text], axis=1)
        seen = jnp.ones(image_tokens.shape[:2], attention_mask.dtype)
        mask = jnp.concatenate([seen, attention_mask], axis=1)
        return self.language_model.encode(embeds, mask), mask

    def forward(
        self, image_tokens, input_ids, attention_mask, decoder_ids
    ) -> Float[Array, "b t vocab"]:
        """Answer logits after each of `decoder_ids` [b, t] (which begin with the start token)."""
        encoder_hidden, mask = self.encode(image_tokens, input_ids, attention_mask)
        return self.language_model.decode(decoder_ids, encoder_hidden, mask)

    def __call__(self, pixel_values, input_ids, attention_mask, decoder_ids):
        """`forward` with one image [b, h, w, 3] a question."""
        image_tokens = self.get_image_tokens(pixel_values)
        return self.forward(image_tokens, input_ids, attention_mask, decoder_ids)

    def generate(
        self, image_tokens, input_ids, attention_mask, max_new_tokens: int
    ) -> Int[Array, "b max_new_tokens"]:
        """Greedy answers as token ids, padded after the end token."""
        encoder_hidden, mask = self.encode(image_tokens, input_ids, attention_mask)
        return self.language_model.generate(encoder_hidden, mask, max_new_tokens)
