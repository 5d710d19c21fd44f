"""CLIP's text and vision towers (Radford et al. 2021), in the layout of transformers' CLIPModel."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from agfsync_jax.models.attention import multi_head
from agfsync_jax.models.layers import (
    ACTIVATIONS,
    Conv,
    Embed,
    LayerNorm,
    Linear,
    ModelConfig,
    param,
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ModelConfig):
    """config.json of a CLIPTextModel or CLIPTextModelWithProjection."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: Literal[tuple(ACTIVATIONS)] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512  # of CLIPTextModelWithProjection


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """config.json of a CLIPVisionModel."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: Literal[tuple(ACTIVATIONS)] = "quick_gelu"
    layer_norm_eps: float = 1e-5

    ignored = {"projection_dim": "a CLIPModel has one for both towers"}


@dataclasses.dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    """config.json of a CLIPModel."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512

    ignored = {"logit_scale_init_value": "the scale is in the checkpoint"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CLIPConfig":
        """As `ModelConfig.from_dict`.

        The first CLIPs repeat a nested config as `text_config_dict`. As in transformers it comes
        before `text_config`, and so do the defaults of the fields that it leaves out.
        """
        values = dict(values)
        for name in ("text_config", "vision_config"):
            repeated = values.pop(f"{name}_dict", None)
            if repeated is not None:
                defaults = dataclasses.asdict(getattr(cls, name))
                values[name] = (values.get(name) or {}) | defaults | repeated
        return super().from_dict(values)


class CLIPTextOutput(NamedTuple):
    """What a text tower says of token ids [b, n]."""

    last_hidden_state: Float[Array, "b n d"]  # after the final norm
    pooler_output: Float[Array, "b d"]  # of these, the one at the end-of-text token
    penultimate_hidden_state: Float[Array, "b n d"]  # of the last layer but one, without a norm
    text_embeds: Float[Array, "b p"] | None = None  # pooler_output projected, where the tower can


class CLIPAttention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, **kwargs):
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj = Linear(width, width, **kwargs)
        self.k_proj = Linear(width, width, **kwargs)
        self.v_proj = Linear(width, width, **kwargs)
        self.out_proj = Linear(width, width, **kwargs)

    def __call__(self, x: Float[Array, "b n d"], mask: Array | None) -> Float[Array, "b n d"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(multi_head(q, k, v, self.heads, mask=mask))


class CLIPMLP(nnx.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: ModelConfig, **kwargs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **kwargs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **kwargs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig, attention_class: type, **kwargs):
        norm = {"epsilon": config.layer_norm_eps, **kwargs}
        self.self_attn = attention_class(config, **kwargs)
        self.layer_norm1 = LayerNorm(config.hidden_size, **norm)
        self.mlp = CLIPMLP(config, **kwargs)
        self.layer_norm2 = LayerNorm(config.hidden_size, **norm)

    def __call__(self, x: Float[Array, "b n d"], mask: Array | None) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    """The stack of blocks; BLIP-2's vision tower has one of another attention."""

    def __init__(self, config: ModelConfig, attention_class: type = CLIPAttention, **kwargs):
        layers = range(config.num_hidden_layers)
        self.layers = nnx.List(
            [CLIPEncoderLayer(config, attention_class, **kwargs) for _ in layers]
        )

    def __call__(
        self, x: Float[Array, "b n d"], mask: Array | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
        """What comes out of the last block, and what goes into it."""
        penultimate = x
        for layer in self.layers:
            penultimate, x = x, layer(x, mask)
        return x, penultimate


class CLIPTextEmbeddings(nnx.Module):
    """Token and position embeddings."""

    def __init__(self, config: CLIPTextConfig, **kwargs):
        width = config.hidden_size
        self.token_embedding = Embed(config.vocab_size, width, **kwargs)
        self.position_embedding = Embed(config.max_position_embeddings, width, **kwargs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        tokens = self.token_embedding(input_ids)
        return tokens + self.position_embedding(jnp.arange(input_ids.shape[1]))[None]


class CLIPTextTransformer(nnx.Module):
    """The causal text tower."""

    def __init__(self, config: CLIPTextConfig, **kwargs):
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config, **kwargs)
        self.encoder = CLIPEncoder(config, **kwargs)
        self.final_layer_norm = LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, **kwargs
        )

    def __call__(self, input_ids: Int[Array, "b n"]) -> CLIPTextOutput:
        length = input_ids.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        x, penultimate = self.encoder(self.embeddings(input_ids), causal)
        x = self.final_layer_norm(x)
        # Old checkpoints say eos_token_id=2 and mean the largest id, which is where their end-of-
        # text token stands.
        if self.eos_token_id == 2:
            end = jnp.argmax(input_ids, axis=-1)
        else:
            end = jnp.argmax(input_ids == self.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return CLIPTextOutput(x, pooled, penultimate)


class CLIPVisionEmbeddings(nnx.Module):
    """Patches, the class token and position embeddings."""

    def __init__(self, config: CLIPVisionConfig, *, dtype, rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        patch, width = config.patch_size, config.hidden_size
        tokens = (config.image_size // patch) ** 2 + 1
        self.class_embedding = param(nnx.initializers.normal(0.02), (width,), rngs=rngs)
        self.patch_embedding = Conv(
            config.num_channels,
            width,
            patch,
            stride=patch,
            padding="VALID",
            use_bias=False,
            **kwargs,
        )
        self.position_embedding = Embed(tokens, width, **kwargs)

    def __call__(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        patches = self.patch_embedding(pixel_values)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        start = jnp.broadcast_to(
            self.class_embedding[...].astype(patches.dtype),
            (patches.shape[0], 1, patches.shape[-1]),
        )
        tokens = jnp.concatenate([start, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))[None]


class CLIPVisionTransformer(nnx.Module):
    """The vision tower."""

    def __init__(self, config: CLIPVisionConfig, **kwargs):
        norm = {"epsilon": config.layer_norm_eps, **kwargs}
        self.embeddings = CLIPVisionEmbeddings(config, **kwargs)
        self.pre_layrnorm = LayerNorm(config.hidden_size, **norm)  # the checkpoint's spelling
        self.encoder = CLIPEncoder(config, **kwargs)
        self.post_layernorm = LayerNorm(config.hidden_size, **norm)

    def __call__(
        self, pixel_values: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b d"]]:
        x, _ = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        return x, self.post_layernorm(x[:, 0])


class CLIPTextModel(nnx.Module):
    """The text tower alone: Stable Diffusion's text encoder, and the first of XL's two."""

    config_class = CLIPTextConfig
    key_aliases = ((r"^(?!text_model\.|text_projection\.)", "text_model."),)  # of transformers 5
    ignored_keys = (r"text_model\.embeddings\.position_ids",)

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.text_model = CLIPTextTransformer(config, dtype=dtype, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> CLIPTextOutput:
        """Hidden states of token ids, without `text_embeds`."""
        return self.text_model(input_ids)


class CLIPTextModelWithProjection(CLIPTextModel):
    """The text tower and its projection: the second text encoder of Stable Diffusion XL."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.text_projection = Linear(
            config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, input_ids: Int[Array, "b n"]) -> CLIPTextOutput:
        """Hidden states of token ids, with `text_embeds`."""
        output = self.text_model(input_ids)
        return output._replace(text_embeds=self.text_projection(output.pooler_output))


class CLIPModel(nnx.Module):
    """Both towers, with their projections into one space."""

    config_class = CLIPConfig
    ignored_keys = (r"(text|vision)_model\.embeddings\.position_ids",)

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        kwargs = {"dtype": dtype, "rngs": rngs}
        text, vision, size = config.text_config, config.vision_config, config.projection_dim
        self.text_model = CLIPTextTransformer(text, **kwargs)
        self.vision_model = CLIPVisionTransformer(vision, **kwargs)
        self.text_projection = Linear(text.hidden_size, size, use_bias=False, **kwargs)
        self.visual_projection = Linear(vision.hidden_size, size, use_bias=False, **kwargs)
        self.logit_scale = param(nnx.initializers.constant(2.6592), (), rngs=rngs)

    def get_text_features(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b p"]:
        """Projected text embeddings, not normalized."""
        return self.text_projection(self.text_model(input_ids).pooler_output)

    def get_image_features(self, pixel_values: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
        """Projected image embeddings, not normalized."""
        return self.visual_projection(self.vision_model(pixel_values)[1])
