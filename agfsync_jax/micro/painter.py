"""The micro suite's own Stable Diffusion while it is being trained."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.backbones.stable_diffusion import StableDiffusion
from agfsync_jax.diffusion.denoising import guide
from agfsync_jax.micro.training import in_batches
from agfsync_jax.samplers import ddim


class Painter:
    """The Stable Diffusion in a suite's folder, from arrays on the host to arrays on the host."""

    def __init__(self, output: Path):
        self.backbone = backbone = StableDiffusion.load(output / "stable-diffusion")
        self.params = params = backbone.params
        self._encode_prompt = jax.jit(
            lambda ids: backbone.encode_prompt(params, ids)["encoder_hidden_states"]
        )
        self.blank = self._encode_prompt(backbone.tokenize([""]))  # [1, n, d]
        # Pictures uint8 [b, 64, 64, 3] -> latents [b, 16, 16, 4], and back.
        encode = jax.jit(lambda images: backbone.encode_image(params, images))
        self.encode = functools.partial(in_batches, encode)
        decode = jax.jit(lambda latents: backbone.decode_latents(params, latents))
        self.decode = functools.partial(in_batches, decode)

    def embed(self, captions: list[str]) -> np.ndarray:
        """Hidden states [b, n, d] of captions."""
        return in_batches(self._encode_prompt, self.backbone.tokenize(captions))

    def draw(self, captions: list[str], seed: int, *, steps: int = 20, guidance: float = 5.0):
        """Pictures uint8 [b, 64, 64, 3] of captions."""

        def sample(denoise, latents):
            return ddim.SAMPLER(denoise, self.backbone.schedule, latents, steps)

        shape = (len(captions), *self.backbone.latent_shape(64, 64))
        noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        return self._sample(sample, guidance, captions, noise)

    def redraw(self, images: np.ndarray, captions: list[str], seed: int, *, level: int, steps: int):
        """Noises pictures to timestep `level` and denoises them in `steps` steps."""
        alphas = jnp.asarray(self.backbone.schedule.alphas_cumprod)
        times = np.linspace(level, 0, steps + 1).round().astype(np.int32)

        def sample(denoise, latents, noise):
            a = alphas[times[0]]
            noisy = jnp.sqrt(a) * latents + jnp.sqrt(1 - a) * noise

            def step(x, pair):
                now, after = alphas[pair[0]], alphas[pair[1]]
                epsilon = denoise(x, jnp.full(x.shape[:1], pair[0]))
                clean = (x - jnp.sqrt(1 - now) * epsilon) / jnp.sqrt(now)
                return jnp.sqrt(after) * clean + jnp.sqrt(1 - after) * epsilon, None

            return jax.lax.scan(step, noisy, np.stack([times[:-1], times[1:]], 1))[0]

        latents = self.encode(images)
        noise = np.random.default_rng(seed).standard_normal(latents.shape).astype(np.float32)
        return self._sample(sample, 3.0, captions, latents, noise)

    def _sample(self, sample: Callable, guidance: float, captions: list[str], *arrays: np.ndarray):
        """Pictures of the latents `sample(guided denoiser, *arrays)`."""

        @jax.jit
        def run(params, context, *arrays):
            denoise = functools.partial(self.backbone.denoise, params)
            given, without = (
                {"encoder_hidden_states": states}
                for states in (context, jnp.broadcast_to(self.blank, context.shape))
            )
            return sample(guide(denoise, given, without, guidance), *arrays)

        run = functools.partial(run, {"unet": self.params["unet"]})
        return self.decode(in_batches(run, self.embed(captions), *arrays))
