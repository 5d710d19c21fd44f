"""The micro suite's own Stable Diffusion while it is being trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agfsync_jax.data.tokenizers import ClipTokenizer
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.micro import folders
from agfsync_jax.micro.training import in_batches, pixels, uint8
from agfsync_jax.models.clip import CLIPTextModel
from agfsync_jax.models.unet import UNet2DConditionModel
from agfsync_jax.models.vae import AutoencoderKL
from agfsync_jax.samplers import ddim
from agfsync_jax.weights import networks as weights


class Painter:
    """The suite's own Stable Diffusion, as far as it is trained."""

    def __init__(self, output: Path):
        folder = output / "stable-diffusion"
        self.tokenize = ClipTokenizer(folder / "tokenizer")
        self.schedule = Schedule.from_config(folders.SCHEDULER)
        text_graph, text = weights.load_model(CLIPTextModel, folder / "text_encoder")
        vae_graph, vae = weights.load_model(AutoencoderKL, folder / "vae")
        factor = weights.read_json(folder / "vae" / "config.json")["scaling_factor"]
        self.encode_text = jax.jit(lambda ids: nnx.merge(text_graph, text)(ids)[0])
        self.encode = jax.jit(lambda x: nnx.merge(vae_graph, vae).encode(pixels(x))[0] * factor)
        self.decode = jax.jit(lambda z: uint8(nnx.merge(vae_graph, vae).decode(z / factor)))
        self.blank = self.encode_text(self.tokenize([""]))  # [1, n, d]
        self.unet: tuple[nnx.GraphDef, nnx.State] | None = None
        if (folder / "unet" / "config.json").exists():
            self.unet = weights.load_model(UNet2DConditionModel, folder / "unet")

    def embed(self, captions: list[str]) -> np.ndarray:
        """Hidden states [b, n, d] of captions."""
        return in_batches(self.encode_text, self.tokenize(captions))

    def guided(self, params: nnx.State, context: jax.Array, guidance_scale: float):
        """The guided denoiser of a batch of contexts."""
        graph = self.unet[0]
        blank = jnp.broadcast_to(self.blank, context.shape)
        return guide(
            lambda x, t, c: nnx.merge(graph, params)(x, t, c), context, blank, guidance_scale
        )

    def draw(self, captions: list[str], seed: int, *, steps: int = 20, guidance: float = 5.0):
        """Pictures uint8 [b, 64, 64, 3] of captions."""

        @jax.jit
        def sample(params, latents, context):
            denoise = self.guided(params, context, guidance)
            return ddim.SAMPLER(denoise, self.schedule, latents, steps)

        shape = (len(captions), *folders.LATENT_SHAPE)
        noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        latents = in_batches(
            lambda *batch: sample(self.unet[1], *batch), noise, self.embed(captions)
        )
        return in_batches(self.decode, latents)

    def redraw(self, images: np.ndarray, captions: list[str], seed: int, *, level: int, steps: int):
        """Noises pictures to timestep `level` and denoises them in `steps` steps."""
        alphas = jnp.asarray(self.schedule.alphas_cumprod)
        times = np.linspace(level, 0, steps + 1).round().astype(np.int32)

        @jax.jit
        def run(params, latents, noise, context):
            denoise = self.guided(params, context, 3.0)
            a = alphas[times[0]]
            noisy = jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise

            def step(x, pair):
                now, after = alphas[pair[0]], alphas[pair[1]]
                epsilon = denoise(x, jnp.full(x.shape[:1], pair[0]))
                clean = (x - jnp.sqrt(1 - now) * epsilon) / jnp.sqrt(now)
                return jnp.sqrt(after) * clean + jnp.sqrt(1 - after) * epsilon, None

            return jax.lax.scan(step, noisy, np.stack([times[:-1], times[1:]], 1))[0]

        latents = in_batches(self.encode, images)
        noise = np.random.default_rng(seed).standard_normal(latents.shape).astype(np.float32)
        latents = in_batches(
            lambda *batch: run(self.unet[1], *batch), latents, noise, self.embed(captions)
        )
        return in_batches(self.decode, latents)
