import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from agfsync_jax.diffusion.denoising import guide


def test_guidance_runs_one_batch_of_twice_the_rows():
    calls = []

    def denoise(latents, timesteps, conditioning):
        calls.append(latents.shape[0])
        return latents * conditioning["x"][:, None] + timesteps[:, None]

    latents = jnp.arange(6.0).reshape(3, 2)
    timesteps = jnp.array([1.0, 2.0, 3.0])
    conditional, unconditional = (
        {"x": jnp.array([1.0, 2.0, 3.0])},
        {"x": jnp.array([0.5, 0.5, 0.5])},
    )
    guided = guide(denoise, conditional, unconditional, 5.0)(latents, timesteps)
    first = latents * 0.5 + timesteps[:, None]
    second = latents * conditional["x"][:, None] + timesteps[:, None]
    np.testing.assert_allclose(guided, first + 5.0 * (second - first), rtol=1e-6)
    plain = guide(denoise, conditional, unconditional, 1.0)(latents, timesteps)
    np.testing.assert_allclose(plain, second, rtol=1e-6)
    assert calls == [6, 3]


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_equals_diffusers(guidance_rescale):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32) * [[[[[0.5, 2.0]]]]]
    first, second = first.astype(np.float32), second.astype(np.float32)
    mixed = torch.from_numpy(first + 7.5 * (second - first))
    theirs = rescale_noise_cfg(mixed, torch.from_numpy(second), guidance_rescale)

    def denoise(latents, timesteps, conditioning):
        return conditioning["prediction"].astype(jnp.float32)

    conditional, unconditional = {"prediction": second}, {"prediction": first}
    guided = guide(denoise, conditional, unconditional, 7.5, guidance_rescale)
    ours = guided(jnp.zeros_like(first), jnp.zeros(3))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (np.abs(ours - mixed.numpy()).max() > 1) == (guidance_rescale > 0)
