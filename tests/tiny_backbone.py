"""The smallest backbone that trains, and how two sets of parameters are compared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.models.layers import Linear
from agfsync_jax.parallel.sharding import infer_shardings

SCHEDULE = Schedule.from_config({"beta_schedule": "scaled_linear", "clip_sample": False})


class Attention(nnx.Module):
    def __init__(self, width, rngs):
        self.to_q = Linear(width, width, use_bias=False, rngs=rngs)
        self.to_k = Linear(6, width, use_bias=False, rngs=rngs)
        self.to_v = Linear(6, width, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([Linear(width, width, rngs=rngs)])

    def __call__(self, x, context):
        b, h, w, c = x.shape
        q = self.to_q(x).reshape(b, h * w, c)
        weights = jax.nn.softmax(q @ self.to_k(context).mT, axis=-1)
        return x + self.to_out[0](weights @ self.to_v(context)).reshape(x.shape)


class Denoiser(nnx.Module):
    """What a denoiser is made of, once: a program of it compiles in a second."""

    def __init__(self, rngs):
        self.conv_in = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.time = Linear(1, 8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.attn1 = Attention(8, rngs)
        self.conv_out = nnx.Conv(8, 4, (3, 3), rngs=rngs)

    def __call__(self, x, timesteps, context):
        time = jnp.sin(self.time(timesteps[:, None] / 100.0))[:, None, None]
        return self.conv_out(self.attn1(jax.nn.silu(self.norm(self.conv_in(x)) + time), context))


@functools.cache
def random_denoiser():
    graph, _ = nnx.split(nnx.eval_shape(lambda: Denoiser(nnx.Rngs(0))))
    return graph, jax.jit(lambda: nnx.state(Denoiser(nnx.Rngs(0))))()


class TinyBackbone:
    """Meets the seam of backbones/ with the denoiser above; prompts are rows of token ids."""

    denoiser_name = "unet"
    schedule = SCHEDULE
    dtype = jnp.float32

    @classmethod
    def load(cls, path, *, mesh=None, rules=(), **settings):
        self = cls()
        self.graph, unet = random_denoiser()
        table = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
        unet = jax.tree.map(jnp.copy, unet)  # training takes the memory of what it loads
        self.params = {"unet": unet, "text_encoder": {"table": jnp.asarray(table)}}
        if mesh:
            self.params = jax.device_put(self.params, infer_shardings(self.params, mesh, rules))
        return self

    @classmethod
    def open(cls, path, **settings):
        return path

    @classmethod
    def read_schedule(cls, files):
        return cls.schedule

    @classmethod
    def tokenizer(cls, files):
        return lambda texts: np.array([[len(text) % 10, 1, 2] for text in texts], np.int32)

    def plain(self):
        return self

    def encode_prompt(self, params, tokens):
        return {"encoder_hidden_states": params["text_encoder"]["table"][tokens]}

    def denoise(self, params, latents, timesteps, conditioning):
        unet = nnx.merge(self.graph, params["unet"])
        return unet(latents, timesteps, conditioning["encoder_hidden_states"])


class Reader(nnx.Module):
    """A text encoder with one layer."""

    def __init__(self):
        self.self_attn = nnx.Dict(q_proj=Linear(6, 6, rngs=nnx.Rngs(1)))

    def __call__(self, x):
        return self.self_attn["q_proj"](x)


class ReadingBackbone(TinyBackbone):
    """Its text encoder can be trained."""

    @classmethod
    def load(cls, path, *, mesh=None, rules=(), **settings):
        self = super().load(path, mesh=mesh, rules=rules)
        self.table = np.asarray(self.params["text_encoder"]["table"])
        self.reader, text = nnx.split(Reader())
        if mesh:
            text = jax.device_put(text, infer_shardings(text, mesh, rules))
        self.params["text_encoder"] = text
        return self

    def encode_prompt(self, params, tokens):
        read = nnx.merge(self.reader, params["text_encoder"])
        return {"encoder_hidden_states": read(jnp.asarray(self.table)[tokens])}


class DrawingBackbone(TinyBackbone):
    """Draws, too: 64x64 images of 16x16x4 latents."""

    def latent_shape(self, height, width):
        return height // 4, width // 4, 4

    def tokenize(self, prompts):
        return self.tokenizer(None)(prompts)

    def decode_latents(self, params, latents):
        pixels = jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 4, axis=2)
        return jnp.round(jax.nn.sigmoid(pixels) * 255).astype(jnp.uint8)

    def describe(self):
        return []

    def count_truncated(self, prompts):
        return 0


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def largest_difference(left, right):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), left, right)))
