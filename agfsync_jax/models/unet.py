"""UNet2DConditionModel: the denoiser of Stable Diffusion 1, 2, Turbo and XL, as in diffusers.

Rombach et al. 2022 (arXiv 2112.10752); Podell et al. 2023 (arXiv 2307.01952) for XL's second
conditioning, the pooled text and the sizes of the image.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from agfsync_jax.models.attention import multi_head
from agfsync_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    LayerNorm,
    Linear,
    ModelConfig,
    ResnetBlock2D,
    Upsample2D,
    checkpointed,
    stacked,
)


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(ModelConfig):
    """config.json of a diffusers UNet2DConditionModel."""

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...] = (
        *("CrossAttnDownBlock2D",) * 3,
        "DownBlock2D",
    )
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...] = (
        "UpBlock2D",
        *("CrossAttnUpBlock2D",) * 3,
    )
    layers_per_block: int = 2
    cross_attention_dim: int = 1280
    # Diffusers' name is wrong and kept: this is the number of heads, one for all blocks or one a
    # block.
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    # The pooled text and the sizes of XL; the two numbers mean nothing without the type.
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    fixed = {
        "act_fn": ("silu", "swish"),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1, 1.0),
        "center_input_sample": (False,),
        "dual_cross_attention": (False,),
        "only_cross_attention": (False,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1, 1.0),
        "time_embedding_type": ("positional",),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "cross_attention_norm": (None,),
        "dropout": (0, 0.0),
    } | dict.fromkeys(
        """class_embed_type encoder_hid_dim encoder_hid_dim_type num_attention_heads
        num_class_embeds reverse_transformer_layers_per_block time_cond_proj_dim
        time_embedding_act_fn time_embedding_dim timestep_post_act""".split(),
        (None,),
    )
    ignored = {
        "addition_embed_type_num_heads": "text_time has no heads",
        "mid_block_only_cross_attention": "the supported middle block does not read it",
        "upcast_attention": "the softmax is always in float32",
    }

    def __post_init__(self):
        self.check_levels("down_block_types", "up_block_types")
        self.check_levels("attention_head_dim", "transformer_layers_per_block")
        sizes = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type and None in sizes:
            raise ValueError(
                "UNet2DConditionModel: addition_embed_type='text_time' needs "
                "addition_time_embed_dim and projection_class_embeddings_input_dim, found "
                f"{sizes[0]} and {sizes[1]}."
            )


def timestep_embedding(
    timesteps: Num[Array, " b"], channels: int, flip_sin_to_cos: bool, shift: int
) -> Float[Array, "b c"]:
    """Sinusoidal embedding of timesteps or sizes (Vaswani et al. 2017), float32."""
    half = channels // 2
    # Constants in torch's roundings: an angle of some 900 turns an ulp of its frequency into 1e-4.
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / (half - shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    waves = (jnp.cos, jnp.sin) if flip_sin_to_cos else (jnp.sin, jnp.cos)
    return jnp.concatenate([wave(angles) for wave in waves], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Two linear layers around SiLU."""

    def __init__(self, features_in: int, features_out: int, **kwargs):
        self.linear_1 = Linear(features_in, features_out, **kwargs)
        self.linear_2 = Linear(features_out, features_out, **kwargs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b d"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention of x over a context, or over itself."""

    def __init__(self, width: int, context_width: int, heads: int, **kwargs):
        self.heads = heads
        self.to_q = Linear(width, width, use_bias=False, **kwargs)
        self.to_k = Linear(context_width, width, use_bias=False, **kwargs)
        self.to_v = Linear(context_width, width, use_bias=False, **kwargs)
        self.to_out = nnx.List([Linear(width, width, **kwargs)])

    def __call__(
        self, x: Float[Array, "b s c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b s c"]:
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out[0](multi_head(q, k, v, self.heads))


class GEGLU(nnx.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int, **kwargs):
        self.proj = Linear(width, 2 * hidden, **kwargs)

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s d"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU, (dropout, which keeps its place in the checkpoint's numbering), linear."""

    def __init__(self, width: int, **kwargs):
        self.net = nnx.List(
            [
                GEGLU(width, 4 * width, **kwargs),
                nnx.Dropout(0.0, deterministic=True),
                Linear(4 * width, width, **kwargs),
            ]
        )

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; all pre-norm."""

    def __init__(self, width: int, context_width: int, heads: int, **kwargs):
        self.norm1 = LayerNorm(width, **kwargs)
        self.attn1 = Attention(width, width, heads, **kwargs)
        self.norm2 = LayerNorm(width, **kwargs)
        self.attn2 = Attention(width, context_width, heads, **kwargs)
        self.norm3 = LayerNorm(width, **kwargs)
        self.ff = FeedForward(width, **kwargs)

    def __call__(
        self, x: Float[Array, "b s c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b s c"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """A transformer over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, level: int, config: UNet2DConditionConfig, **kwargs):
        heads, layers = (
            each if isinstance(each, int) else each[level]
            for each in (config.attention_head_dim, config.transformer_layers_per_block)
        )
        if channels % heads:
            raise ValueError(
                f"UNet2DConditionModel: {channels} channels do not divide into {heads} heads."
            )
        project = Linear if config.use_linear_projection else Conv
        size = () if config.use_linear_projection else (1,)
        self.norm = GroupNorm(channels, config.norm_num_groups, 1e-6, **kwargs)
        self.proj_in = project(channels, channels, *size, **kwargs)
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(channels, config.cross_attention_dim, heads, **kwargs)
                for _ in range(layers)
            ]
        )
        self.proj_out = project(channels, channels, *size, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b t d"]
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        tokens = stacked(self.transformer_blocks, tokens, context)
        return x + self.proj_out(tokens.reshape(b, h, w, c))


def _resnets(
    features_in: Sequence[int], features_out: int, config: UNet2DConditionConfig, **kwargs
) -> nnx.List:
    """Resnets that read the timestep, one for each number of channels that go in."""
    time_width = 4 * config.block_out_channels[0]
    norm = config.norm_num_groups, config.norm_eps
    return nnx.List(
        [ResnetBlock2D(each, features_out, *norm, time_width, **kwargs) for each in features_in]
    )


class DownBlock2D(nnx.Module):
    """Resnets, each with a transformer in the cross-attention type, then a downsampler.

    The last block has no downsampler; the others' pads (1, 1), unlike the VAE's.
    """

    def __init__(self, level: int, config: UNet2DConditionConfig, **kwargs):
        widths = config.block_out_channels
        width = widths[level]
        ins = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = _resnets(ins, width, config, **kwargs)
        if config.down_block_types[level] == "CrossAttnDownBlock2D":
            self.attentions = nnx.List(
                [Transformer2DModel(width, level, config, **kwargs) for _ in ins]
            )
        if level < len(widths) - 1:
            self.downsamplers = nnx.List([Downsample2D(width, (1, 1), **kwargs)])

    def __call__(
        self, x, time, context
    ) -> tuple[Float[Array, "b h w c"], list[Float[Array, "b h w c"]]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = checkpointed(resnet, x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, config: UNet2DConditionConfig, **kwargs):
        width = config.block_out_channels[-1]
        self.resnets = _resnets([width] * 2, width, config, **kwargs)
        self.attentions = nnx.List([Transformer2DModel(width, -1, config, **kwargs)])

    def __call__(self, x, time, context) -> Float[Array, "b h w c"]:
        x = self.attentions[0](checkpointed(self.resnets[0], x, time), context)
        return checkpointed(self.resnets[1], x, time)


class UpBlock2D(nnx.Module):
    """The mirror of the down block: each resnet takes one skip connection.

    The last block has no upsampler.
    """

    def __init__(self, index: int, config: UNet2DConditionConfig, **kwargs):
        widths = config.block_out_channels[::-1]
        level = len(widths) - 1 - index
        width, previous = widths[index], widths[max(index - 1, 0)]
        inputs = [previous] + [width] * config.layers_per_block
        skips = [width] * config.layers_per_block + [widths[min(index + 1, len(widths) - 1)]]
        ins = [sum(pair) for pair in zip(inputs, skips, strict=True)]
        self.resnets = _resnets(ins, width, config, **kwargs)
        if config.up_block_types[index] == "CrossAttnUpBlock2D":
            self.attentions = nnx.List(
                [Transformer2DModel(width, level, config, **kwargs) for _ in ins]
            )
        if level > 0:
            self.upsamplers = nnx.List([Upsample2D(width, **kwargs)])

    def __call__(self, x, skips, time, context) -> Float[Array, "b h w c"]:
        for i, resnet in enumerate(self.resnets):
            x = checkpointed(resnet, jnp.concatenate([x, skips.pop()], axis=-1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise, or the velocity, in latents.

    Compute is in `dtype`; parameters, group statistics, the softmax and the sinusoids are float32.
    """

    config_class = UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        kwargs = {"dtype": dtype, "rngs": rngs}
        widths = config.block_out_channels
        levels = range(len(widths))
        self.conv_in = Conv(config.in_channels, widths[0], **kwargs)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0], **kwargs)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, 4 * widths[0], **kwargs
            )
        self.down_blocks = nnx.List([DownBlock2D(level, config, **kwargs) for level in levels])
        self.mid_block = UNetMidBlock2DCrossAttn(config, **kwargs)
        self.up_blocks = nnx.List([UpBlock2D(index, config, **kwargs) for index in levels])
        self.conv_norm_out = GroupNorm(widths[0], config.norm_num_groups, config.norm_eps, **kwargs)
        self.conv_out = Conv(widths[0], config.out_channels, **kwargs)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timesteps: Int[Array, " b"],
        encoder_hidden_states: Float[Array, "b n d"],
        text_embeds: Float[Array, "b p"] | None = None,
        time_ids: Num[Array, "b k"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The prediction for noisy latents at timesteps, given the text's hidden states.

        A network with addition_embed_type="text_time" also reads `text_embeds`, the projected
        pooled text, and `time_ids`: original height and width, top and left of the crop, then the
        target height and width (XL's base) or the aesthetic score (its refiner).

        Raises:
          ValueError: `text_embeds` and `time_ids` do not fit the network.
        """
        time = self.time_embedding(self._sinusoid(timesteps, self.config.block_out_channels[0]))
        if self.config.addition_embed_type or text_embeds is not None or time_ids is not None:
            added = self._added(text_embeds, time_ids)
            time = time + self.add_embedding(added)
        context = encoder_hidden_states.astype(self.dtype)
        x = self.conv_in(sample.astype(self.dtype))
        skips = [x]
        for down in self.down_blocks:
            x, new = down(x, time, context)
            skips.extend(new)
        x = self.mid_block(x, time, context)
        for up in self.up_blocks:
            x = up(x, skips, time, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def _sinusoid(self, values: Num[Array, " b"], channels: int) -> Float[Array, "b c"]:
        flip, shift = self.config.flip_sin_to_cos, self.config.freq_shift
        return timestep_embedding(values, channels, flip, shift).astype(self.dtype)

    def _added(self, text_embeds, time_ids) -> Float[Array, "b p+k*c"]:
        """What `add_embedding` reads: the pooled text and the sinusoids of the sizes."""
        config = self.config
        if config.addition_embed_type is None:
            raise ValueError(
                "UNet2DConditionModel: text_embeds and time_ids are for networks with "
                "addition_embed_type='text_time' (XL); this one has none: leave them out."
            )
        if text_embeds is None or time_ids is None:
            raise ValueError(
                "UNet2DConditionModel: addition_embed_type='text_time' (XL) needs text_embeds "
                "[b, p] and time_ids [b, k]."
            )
        (b, count), channels = time_ids.shape, config.addition_time_embed_dim
        sizes = self._sinusoid(time_ids.reshape(-1), channels).reshape(b, -1)
        added = jnp.concatenate([text_embeds.astype(self.dtype), sizes], axis=-1)
        if added.shape[-1] != config.projection_class_embeddings_input_dim:
            raise ValueError(
                f"UNet2DConditionModel: text_embeds of {text_embeds.shape[-1]} numbers and {count} "
                f"time_ids of {channels} make {added.shape[-1]}, the network takes "
                f"{config.projection_class_embeddings_input_dim}."
            )
        return added
