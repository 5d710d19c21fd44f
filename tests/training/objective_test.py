"""Noise, and what a loss is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.losses import Loss
from agfsync_jax.training.objective import NUM_BINS, draw_noise, preference_loss
from tests.tiny_backbone import SCHEDULE


def test_noise_belongs_to_the_example():
    draw = jax.jit(
        lambda step, example: draw_noise(3, step, example, (2, 2, 4), num_timesteps=1000)
    )
    noise, times = draw(5, jnp.arange(4000))
    again, times_again = draw(5, jnp.arange(4000)[::-1])
    np.testing.assert_array_equal(again[::-1], noise)
    np.testing.assert_array_equal(times_again[::-1], times)
    other, _ = draw(6, jnp.arange(4000))
    assert not np.allclose(other, noise)
    assert abs(np.mean(noise)) < 0.02 and abs(np.std(noise) - 1) < 0.02
    assert (np.min(times), np.max(times)) == (0, 999)
    assert abs(np.mean(times) - 499.5) < 15


def apart(residuals):
    """Not a loss: how far chosen and rejected are from each other."""
    return residuals.policy_errors[:, 0], {"apart": jnp.abs(jnp.diff(residuals.policy, axis=1))}


@pytest.mark.parametrize("same_noise", [True, False])
@pytest.mark.parametrize("uses_reference", [True, False])
def test_a_loss_is_given_what_it_says(same_noise, uses_reference):
    """A denoiser that predicts nothing leaves the noise as its residual."""
    asked = []

    def denoise(params, latents, timesteps, conditioning):
        asked.append(params)
        return jnp.zeros_like(latents)

    def inputs(residuals):
        assert (residuals.reference is not None) == uses_reference
        return (residuals,)

    batch = {"latents": jnp.ones((5, 2, 4, 4, 3)), "example": jnp.arange(5), "conditioning": {}}
    value, metrics = preference_loss(
        "policy",
        "reference",
        batch,
        loss=Loss(apart, inputs, uses_reference=uses_reference, same_noise=same_noise),
        denoise=denoise,
        schedule=SCHEDULE,
        seed=0,
        step=jnp.int32(0),
    )
    assert asked == ["policy", "reference"][: 1 + uses_reference]
    assert float(metrics["apart"]) == 0 if same_noise else float(metrics["apart"]) > 0.5
    assert 0.5 < value < 2 and value == metrics["loss"] == metrics["chosen_error"]
    np.testing.assert_allclose(jnp.sum(metrics["error_by_time"]) / 5, value, rtol=1e-6)
    assert metrics["count_by_time"].shape == (NUM_BINS,) and jnp.sum(metrics["count_by_time"]) == 5
