"""AutoencoderKL: images [b, h, w, 3] in [-1, 1] <-> latents [b, h/f, w/f, c].

As in diffusers; Rombach et al. 2022 (arXiv 2112.10752).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agfsync_jax.models.attention import multi_head
from agfsync_jax.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    Linear,
    ModelConfig,
    ResnetBlock2D,
    Upsample2D,
)

_EPSILON = 1e-6  # of the norms


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(ModelConfig):
    """config.json of a diffusers AutoencoderKL."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int | tuple[int, ...] = 32
    force_upcast: bool = True  # XL's activations leave the range of float16
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)

    fixed = {
        "act_fn": ("silu", "swish"),
        "mid_block_add_attention": (True,),
        "shift_factor": (None, 0, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    def __post_init__(self):
        self.check_levels("down_block_types", "up_block_types")

    @property
    def downscale(self) -> int:
        """Pixels per latent along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(nnx.Module):
    """Single-head self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, groups: int, **kwargs):
        self.group_norm = GroupNorm(channels, groups, _EPSILON, **kwargs)
        self.to_q = Linear(channels, channels, **kwargs)
        self.to_k = Linear(channels, channels, **kwargs)
        self.to_v = Linear(channels, channels, **kwargs)
        self.to_out = nnx.List([Linear(channels, channels, **kwargs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return x + self.to_out[0](multi_head(q, k, v, 1)).reshape(b, h, w, c)


def _resnets(features_in: Sequence[int], features_out: int, groups: int, **kwargs) -> nnx.List:
    """Resnets, one for each number of channels that go in."""
    return nnx.List(
        [ResnetBlock2D(each, features_out, groups, _EPSILON, **kwargs) for each in features_in]
    )


class MidBlock2D(nnx.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int, **kwargs):
        self.resnets = _resnets([channels] * 2, channels, groups, **kwargs)
        self.attentions = nnx.List([Attention(channels, groups, **kwargs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownEncoderBlock2D(nnx.Module):
    """Resnets, then a downsampler in all blocks but the last; it pads (0, 1), unlike the UNet's."""

    def __init__(self, level: int, config: AutoencoderKLConfig, **kwargs):
        widths = config.block_out_channels
        width = widths[level]
        ins = [widths[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
        self.resnets = _resnets(ins, width, config.norm_num_groups, **kwargs)
        if level < len(widths) - 1:
            self.downsamplers = nnx.List([Downsample2D(width, (0, 1), **kwargs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UpDecoderBlock2D(nnx.Module):
    """Resnets, then an upsampler in all blocks but the last."""

    def __init__(self, index: int, config: AutoencoderKLConfig, **kwargs):
        widths = config.block_out_channels[::-1]
        width = widths[index]
        ins = [widths[max(index - 1, 0)]] + [width] * config.layers_per_block
        self.resnets = _resnets(ins, width, config.norm_num_groups, **kwargs)
        if index < len(widths) - 1:
            self.upsamplers = nnx.List([Upsample2D(width, **kwargs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
    """Images to the moments of the latents."""

    def __init__(self, config: AutoencoderKLConfig, **kwargs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], **kwargs)
        self.down_blocks = nnx.List(
            [DownEncoderBlock2D(level, config, **kwargs) for level in range(len(widths))]
        )
        self.mid_block = MidBlock2D(widths[-1], groups, **kwargs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPSILON, **kwargs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kwargs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h/f w/f 2*c"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents to images."""

    def __init__(self, config: AutoencoderKLConfig, **kwargs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], **kwargs)
        self.mid_block = MidBlock2D(widths[0], groups, **kwargs)
        self.up_blocks = nnx.List(
            [UpDecoderBlock2D(index, config, **kwargs) for index in range(len(widths))]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, _EPSILON, **kwargs)
        self.conv_out = Conv(widths[-1], config.out_channels, **kwargs)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h*f w*f 3"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder of Stable Diffusion.

    Latents here are unscaled: multiply by `config.scaling_factor` outside.
    """

    config_class = AutoencoderKLConfig
    key_aliases = (
        # The spelling of attention that the first Stable Diffusion checkpoints carry.
        (r"(mid_block\.attentions\.\d+)\.query\.", r"\1.to_q."),
        (r"(mid_block\.attentions\.\d+)\.key\.", r"\1.to_k."),
        (r"(mid_block\.attentions\.\d+)\.value\.", r"\1.to_v."),
        (r"(mid_block\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    )

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.encoder = Encoder(config, **kwargs)
        self.decoder = Decoder(config, **kwargs)
        channels = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, 1, **kwargs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, 1, **kwargs)

    def encode(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b h/f w/f c"], Float[Array, "b h/f w/f c"]]:
        """Mean and log-variance of the posterior; the log-variance is clamped to [-30, 20]."""
        moments = self.encoder(images)
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h*f w*f 3"]:
        """Images, nominally in [-1, 1], of unscaled latents."""
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
