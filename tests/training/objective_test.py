"""Noise, and what a loss is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import Loss
from agfsync_jax.training.objective import (
    NUM_BINS,
    Noising,
    draw_noise,
    preference_loss,
    time_weights,
    timesteps_of,
)
from agfsync_jax.utils import modules
from tests.losses.formulas_test import FORMULAS, MASK, SCORES, settings
from tests.tiny_backbone import SCHEDULE


def test_noise_belongs_to_the_example():
    draw = jax.jit(lambda step, example: draw_noise(3, step, example, (2, 2, 4), range(1000)))
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


def test_noise_and_timesteps_are_independent():
    """Across examples, the timestep says nothing of the noise; no two images have the same."""
    noise, times = draw_noise(0, jnp.int32(1), jnp.arange(4000), (4,), range(1000), copies=2)
    scaled = (np.asarray(times, np.float64) - 499.5) / 288.7
    flat = np.asarray(noise, np.float64).reshape(4000, -1)
    correlation = flat.T @ scaled / 4000
    assert np.abs(correlation).max() < 0.06
    between = flat.T @ flat / 4000 - np.eye(8)
    assert np.abs(between).max() < 0.08


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", range(1000)),
        ("0:200", range(200)),  # Diffusion-DPO's code: t % 200 of SDXL's refiner
        ("249,499,749,999", {249, 499, 749, 999}),  # and those of Turbo
        ("999", {999}),
    ],
)
def test_timesteps_that_are_learned(text, want):
    possible = timesteps_of(text, 1000)
    _, times = draw_noise(0, jnp.int32(0), jnp.arange(20_000), (1,), possible)
    values, counts = np.unique(times, return_counts=True)
    assert set(values.tolist()) == set(want)
    assert counts.min() > 0 and counts.std() < 2 * np.sqrt(20_000 / len(want))


@pytest.mark.parametrize("text", ["0:1001", "1000", "5:5", "7:3"])
def test_timesteps_that_are_none(text):
    with pytest.raises(ValueError, match=r"config.train.timesteps=.*some of 0 to 999"):
        timesteps_of(text, 1000)


@pytest.mark.parametrize("name", modules.names("losses"))
def test_every_loss_by_its_formula_in_float64(name):
    """Residuals made here, from the noise and the timesteps, and the formula of whole residuals: a
    reference that is swapped, a noise that is not shared as it should be, or an error of another
    image would show."""
    loss = modules.load("losses", name).LOSS.configured(**settings(name))
    k = 4 if loss.is_listwise else 2
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(5, k, 2, 2, 3)).astype(np.float32)
    text = rng.normal(size=(5, 3)).astype(np.float32)
    example = jnp.array([5, 3, 11, 2, 8])
    batch = {
        "latents": jnp.asarray(latents),
        "example": example,
        "conditioning": {"text": jnp.asarray(text)},
        "scores": jnp.asarray(SCORES[:, :k], jnp.float32),
    }
    batch |= {"mask": jnp.asarray(MASK)} if loss.is_listwise else {}
    weights = {"policy": 0.32, "reference": 0.3}

    def predict(weight, noisy, times, text, numpy):
        told = numpy.mean(text, axis=-1)[:, None, None, None]
        return weight * noisy + 0.01 * told + 1e-4 * times[:, None, None, None]

    def denoise(model, noisy, times, conditioning):
        return predict(model, noisy, times, conditioning["text"], jnp)

    value, metrics = preference_loss(
        weights["policy"],
        weights["reference"],
        batch,
        loss=loss,
        denoise=denoise,
        schedule=SCHEDULE,
        seed=9,
        step=jnp.int32(4),
    )
    copies = 1 if loss.same_noise else k
    noise, times = draw_noise(9, jnp.int32(4), example, (2, 2, 3), range(1000), copies)
    noise = np.broadcast_to(np.asarray(noise, np.float64), latents.shape)
    times = np.asarray(times)
    alpha = SCHEDULE.alphas_cumprod.astype(np.float64)[times][:, None, None, None]
    residuals = {model: np.zeros(latents.shape) for model in weights}
    for model, weight in weights.items():
        for image in range(k):
            noisy = np.sqrt(alpha) * latents[:, image] + np.sqrt(1 - alpha) * noise[:, image]
            guess = predict(weight, noisy, times, text.astype(np.float64), np)
            residuals[model][:, image] = guess - noise[:, image]
    policy, reference = (torch.tensor(residuals[model]) for model in weights)
    given = settings(name)
    if name == "diffusion_nft":
        given["scale"] = np.sqrt((1 - alpha) / alpha).ravel()
        assert given["scale"].min() < 1 < given["scale"].max()
    exact = FORMULAS[name](policy, reference, **given).item()
    np.testing.assert_allclose(value, exact, rtol=1e-4)
    assert ("divergence" in metrics) == loss.uses_reference
    if loss.uses_reference:
        apart = (residuals["policy"] - residuals["reference"]) ** 2
        present = MASK if loss.is_listwise else np.ones((5, 2), bool)
        each = [a[p].mean() if p.any() else 0 for a, p in zip(apart, present, strict=True)]
        np.testing.assert_allclose(metrics["divergence"], np.mean(each), rtol=1e-4)
    errors = (residuals["policy"] ** 2).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(metrics["chosen_error"], errors[:, 0].mean(), rtol=1e-4)
    bins = np.zeros(NUM_BINS)
    np.add.at(bins, times * NUM_BINS // 1000, errors[:, 0])
    np.testing.assert_allclose(metrics["error_by_time"], bins, rtol=1e-4)
    if not loss.is_listwise:
        np.testing.assert_allclose(metrics["rejected_error"], errors[:, 1].mean(), rtol=1e-4)


@pytest.mark.parametrize("copies", [1, 2])
def test_no_key_is_used_twice(copies):
    with jax.debug_key_reuse(True):
        draw_noise(0, jnp.int32(1), jnp.arange(3), (4,), range(1000), copies)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_counts_as_in_diffusers(prediction_type):
    """Errors of a batch, weighted; the metrics stay those of the errors themselves."""
    from diffusers import DDIMScheduler
    from diffusers.training_utils import compute_snr

    config = {"beta_schedule": "scaled_linear", "prediction_type": prediction_type}
    schedule, theirs = Schedule.from_config(config), DDIMScheduler(**config)
    snr = compute_snr(theirs, torch.arange(1000)).double()
    wanted = torch.clamp(snr, max=5.0) / (snr + 1 if prediction_type == "v_prediction" else snr)
    np.testing.assert_allclose(time_weights(schedule, 5.0), wanted, rtol=1e-4)

    batch = {"latents": jnp.ones((6, 2, 4, 4, 3)), "example": jnp.arange(6), "conditioning": {}}
    call = {"loss": modules.load("losses", "sft").LOSS, "schedule": schedule, "seed": 0}
    call |= {"denoise": lambda _, latents, *rest: 0.5 * latents, "step": jnp.int32(3)}
    plain, errors = preference_loss(None, None, batch, **call)
    value, metrics = preference_loss(None, None, batch, noising=Noising(min_snr_gamma=5.0), **call)
    noise, times = draw_noise(0, jnp.int32(3), batch["example"], (4, 4, 3), range(1000))
    clean = batch["latents"][:, 0]
    noisy = schedule.add_noise(clean, noise[:, 0], times)
    error = jnp.mean((0.5 * noisy - schedule.target(clean, noise[:, 0], times)) ** 2, (1, 2, 3))
    weight = np.asarray(wanted)[np.asarray(times)]
    np.testing.assert_allclose(value, np.mean(weight * np.asarray(error)), rtol=1e-4)
    np.testing.assert_allclose(plain, np.mean(error), rtol=1e-5)
    assert metrics["chosen_error"] == errors["chosen_error"] and abs(value - plain) > 0.01


def test_a_noise_offset_is_one_number_a_channel():
    plain, _ = draw_noise(0, jnp.int32(1), jnp.arange(500), (8, 8, 3), range(1000), 2)
    noise, _ = draw_noise(0, jnp.int32(1), jnp.arange(500), (8, 8, 3), range(1000), 2, 0.5)
    means = np.asarray(noise).mean(axis=(2, 3))  # [500, 2, 3]
    assert abs(means.std() - np.hypot(0.5, 1 / 8)) < 0.02
    assert abs(np.asarray(plain).mean(axis=(2, 3)).std() - 1 / 8) < 0.01
    inside = noise - noise.mean(axis=(2, 3), keepdims=True)
    assert abs(np.asarray(inside).std() - np.sqrt(63 / 64)) < 0.01
    apart = np.corrcoef(means.reshape(500, -1), rowvar=False) - np.eye(6)
    assert np.abs(apart).max() < 0.2  # no two channels or images share it
