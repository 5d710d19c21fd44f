import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion.schedules import PARAMETERIZATIONS, Schedule
from agfsync_jax.samplers import ddim

SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_equal_diffusers(beta_schedule, zero_snr):
    config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr}
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(
        Schedule.from_config(config).alphas_cumprod, theirs, atol=1e-6, rtol=1e-4
    )


def test_noise_and_velocity_equal_diffusers():
    scheduler = diffusers.DDIMScheduler.from_config(SD15)
    schedule = Schedule.from_config(SD15 | {"prediction_type": "v_prediction"})
    rng = np.random.default_rng(0)
    latents, noise = rng.normal(size=(2, 3, 4, 4, 4)).astype(np.float32)
    timesteps = np.array([0, 500, 999])
    arguments = [torch.from_numpy(x) for x in (latents, noise, timesteps)]
    noisy, target = (
        function(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps))
        for function in (schedule.add_noise, schedule.target)
    )
    np.testing.assert_allclose(noisy, scheduler.add_noise(*arguments), atol=2e-6)
    np.testing.assert_allclose(target, scheduler.get_velocity(*arguments), atol=2e-6)


def test_targets_of_the_other_prediction_types():
    latents, noise, timesteps = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)), jnp.array([3])
    assert (Schedule.from_config(SD15).target(latents, noise, timesteps) == noise).all()
    sample = Schedule.from_config(SD15 | {"prediction_type": "sample"})
    assert (sample.target(latents, noise, timesteps) == latents).all()


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_what_is_predicted_tells_signal_and_noise(name):
    """x_0 and noise come back from the right prediction, at every mixture of the two."""
    rows = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    signal = np.array([0.9, 0.5, 0.1, 0.01, 0.99], np.float32)
    for sigma in (np.sqrt(1 - signal**2), 1 - signal if name != "v_prediction" else None):
        if sigma is not None:  # a velocity is of signal^2 + sigma^2 = 1
            each = PARAMETERIZATIONS[name]
            prediction = each.target(*rows, signal, sigma)
            x = signal * rows[0] + sigma * rows[1]
            for got, wanted in zip((each.clean, each.noise), rows, strict=True):
                np.testing.assert_allclose(got(x, prediction, signal, sigma), wanted, atol=1e-4)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_how_far_a_wrong_prediction_leads(name):
    schedule = Schedule.from_config(SD15 | {"prediction_type": name})
    times = jnp.array([0, 300, 999])
    alphas = schedule.alphas_cumprod.astype(np.float64)[np.asarray(times)]
    wanted = {
        "epsilon": np.sqrt((1 - alphas) / alphas),
        "v_prediction": np.sqrt(1 - alphas),
        "sample": np.ones(3),
    }
    np.testing.assert_allclose(schedule.clean_scale(times), wanted[name], rtol=1e-5)


def test_clipping_is_off_unless_the_file_or_ddims_default_clips():
    without = {key: value for key, value in SD15.items() if key != "clip_sample"}
    for config, clips in [(SD15, False), (without, True), (SD15 | {"clip_sample": True}, True)]:
        theirs = diffusers.DDIMScheduler.from_config(config).config.clip_sample
        fields = ddim.SAMPLER.fields(Schedule.from_config(config))
        assert fields.clip_sample == clips == theirs


def test_kinds_of_noise_are_listed_together():
    changes = {"prediction_type": "flow", "beta_schedule": "sigmoid"}
    with pytest.raises(ValueError, match="prediction_type='flow'.*; beta_schedule='sigmoid'"):
        Schedule.from_config(SD15 | changes)
    with pytest.raises(ValueError, match="2 trained_betas for 1000 timesteps"):
        Schedule.from_config(SD15 | {"trained_betas": [0.1, 0.2]})


def test_unsupported_fields_are_listed_together():
    schedule = Schedule.from_config(SD15 | {"thresholding": True, "timestep_spacing": "even"})
    with pytest.raises(ValueError, match="thresholding=True.*; timestep_spacing='even'.*change"):
        ddim.SAMPLER.fields(schedule)
