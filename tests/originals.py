"""Checkpoints as their authors write them: key -> shape, from the original constructors.

latent-diffusion's UNet and autoencoder, CLIP's and open_clip's text towers, under the prefixes of a
single file; and `Tensor`s made of such lists.
"""

import numpy as np

from agfsync_jax.weights.tensor_files import Tensor, from_array


def affine(name, features_out, *inner):
    """A layer: features_out and what a weight has besides (nothing for a norm)."""
    return {f"{name}.weight": (features_out, *inner), f"{name}.bias": (features_out,)}


def ldm_resnet(name, time, features_in, features_out):
    keys = affine(f"{name}.in_layers.0", features_in)
    keys |= affine(f"{name}.in_layers.2", features_out, features_in, 3, 3)
    keys |= affine(f"{name}.emb_layers.1", features_out, time)
    keys |= affine(f"{name}.out_layers.0", features_out)
    keys |= affine(f"{name}.out_layers.3", features_out, features_out, 3, 3)
    if features_in != features_out:
        keys |= affine(f"{name}.skip_connection", features_out, features_in, 1, 1)
    return keys


def ldm_transformer(name, width, depth, context, linear):
    conv = () if linear else (1, 1)
    keys = affine(f"{name}.norm", width) | affine(f"{name}.proj_in", width, width, *conv)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, inner in (("attn1", width), ("attn2", context)):
            keys[f"{block}.{attention}.to_q.weight"] = (width, width)
            keys[f"{block}.{attention}.to_k.weight"] = (width, inner)
            keys[f"{block}.{attention}.to_v.weight"] = (width, inner)
            keys |= affine(f"{block}.{attention}.to_out.0", width, width)
        keys |= affine(f"{block}.ff.net.0.proj", 8 * width, width)
        keys |= affine(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            keys |= affine(f"{block}.{norm}", width)
    return keys | affine(f"{name}.proj_out", width, width, *conv)


def ldm_unet(channels, mult, layers, depth, context, linear=True, adm=None, inputs=4):
    """ldm/modules/diffusionmodules/openaimodel.py: UNetModel.__init__. `depth` 0: no attention."""
    time, keys, skips = 4 * channels, {}, [channels]
    keys |= affine("time_embed.0", time, channels) | affine("time_embed.2", time, time)
    if adm:
        keys |= affine("label_emb.0.0", time, adm) | affine("label_emb.0.2", time, time)
    keys |= affine("input_blocks.0.0", channels, inputs, 3, 3)
    ch, number = channels, 1
    for level, factor in enumerate(mult):
        for _ in range(layers):
            keys |= ldm_resnet(f"input_blocks.{number}.0", time, ch, factor * channels)
            ch = factor * channels
            if depth[level]:
                keys |= ldm_transformer(
                    f"input_blocks.{number}.1", ch, depth[level], context, linear
                )
            skips.append(ch)
            number += 1
        if level < len(mult) - 1:
            keys |= affine(f"input_blocks.{number}.0.op", ch, ch, 3, 3)
            skips.append(ch)
            number += 1
    middle = depth[-1] or max(depth)
    keys |= ldm_resnet("middle_block.0", time, ch, ch)
    keys |= ldm_transformer("middle_block.1", ch, middle, context, linear)
    keys |= ldm_resnet("middle_block.2", time, ch, ch)
    number = 0
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            keys |= ldm_resnet(
                f"output_blocks.{number}.0", time, ch + skips.pop(), factor * channels
            )
            ch, place = factor * channels, 1
            if depth[level]:
                keys |= ldm_transformer(
                    f"output_blocks.{number}.1", ch, depth[level], context, linear
                )
                place = 2
            if level and i == layers:
                keys |= affine(f"output_blocks.{number}.{place}.conv", ch, ch, 3, 3)
            number += 1
    return keys | affine("out.0", ch) | affine("out.2", 4, ch, 3, 3)


def ldm_vae(channels, mult, layers, latent=4):
    """ldm/modules/diffusionmodules/model.py: Encoder and Decoder."""

    def resnet(name, features_in, features_out):
        keys = affine(f"{name}.norm1", features_in) | affine(f"{name}.norm2", features_out)
        keys |= affine(f"{name}.conv1", features_out, features_in, 3, 3)
        keys |= affine(f"{name}.conv2", features_out, features_out, 3, 3)
        if features_in != features_out:
            keys |= affine(f"{name}.nin_shortcut", features_out, features_in, 1, 1)
        return keys

    def middle(name, ch):
        keys = resnet(f"{name}.block_1", ch, ch) | resnet(f"{name}.block_2", ch, ch)
        keys |= affine(f"{name}.attn_1.norm", ch)
        for part in ("q", "k", "v", "proj_out"):
            keys |= affine(f"{name}.attn_1.{part}", ch, ch, 1, 1)
        return keys

    keys, ch = affine("encoder.conv_in", channels, 3, 3, 3), channels
    for level, factor in enumerate(mult):
        for i in range(layers):
            keys |= resnet(f"encoder.down.{level}.block.{i}", ch, factor * channels)
            ch = factor * channels
        if level < len(mult) - 1:
            keys |= affine(f"encoder.down.{level}.downsample.conv", ch, ch, 3, 3)
    keys |= middle("encoder.mid", ch) | affine("encoder.norm_out", ch)
    keys |= affine("encoder.conv_out", 2 * latent, ch, 3, 3)
    keys |= affine("decoder.conv_in", ch, latent, 3, 3) | middle("decoder.mid", ch)
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(layers + 1):
            keys |= resnet(f"decoder.up.{level}.block.{i}", ch, factor * channels)
            ch = factor * channels
        if level:
            keys |= affine(f"decoder.up.{level}.upsample.conv", ch, ch, 3, 3)
    keys |= affine("decoder.norm_out", ch) | affine("decoder.conv_out", 3, ch, 3, 3)
    keys |= affine("quant_conv", 2 * latent, 2 * latent, 1, 1)
    return keys | affine("post_quant_conv", latent, latent, 1, 1)


def open_clip_text(width, layers, vocab=49408, length=77, embed=None):
    """open_clip/transformer.py: TextTransformer."""
    keys = {"positional_embedding": (length, width), "text_projection": (width, embed or width)}
    keys |= {"logit_scale": (), "token_embedding.weight": (vocab, width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        keys |= affine(f"{block}.ln_1", width) | affine(f"{block}.ln_2", width)
        keys[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        keys[f"{block}.attn.in_proj_bias"] = (3 * width,)
        keys |= affine(f"{block}.attn.out_proj", width, width)
        keys |= affine(f"{block}.mlp.c_fc", 4 * width, width)
        keys |= affine(f"{block}.mlp.c_proj", width, 4 * width)
    return keys | affine("ln_final", width)


def clip_text(width, layers, vocab=49408, length=77):
    """transformers before 5: CLIPTextModel."""
    keys = {"embeddings.position_ids": (1, length)}
    keys["embeddings.token_embedding.weight"] = (vocab, width)
    keys["embeddings.position_embedding.weight"] = (length, width)
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            keys |= affine(f"{layer}.self_attn.{part}", width, width)
        keys |= affine(f"{layer}.layer_norm1", width) | affine(f"{layer}.layer_norm2", width)
        keys |= affine(f"{layer}.mlp.fc1", 4 * width, width)
        keys |= affine(f"{layer}.mlp.fc2", width, 4 * width)
    keys |= affine("final_layer_norm", width)
    return {f"text_model.{key}": shape for key, shape in keys.items()}


def at(prefix, keys):
    return {f"{prefix}.{key}": shape for key, shape in keys.items()}


def unread(keys):
    def fetch(index):
        raise AssertionError("a tensor was read")

    return {key: Tensor(key, shape, np.dtype("float16"), fetch) for key, shape in keys.items()}


def filled(keys, seed=0):
    """Random arrays, no two alike."""
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in keys.items()}


def from_arrays(arrays):
    return {key: from_array(key, value) for key, value in arrays.items()}


def torch_shapes(model):
    """Canonical key -> shape: transformers 5 writes CLIPTextModel without its prefix."""
    bare = type(model).__name__ == "CLIPTextModel"
    return {
        f"text_model.{key.removeprefix('text_model.')}" if bare else key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if not key.endswith("position_ids")
    }
