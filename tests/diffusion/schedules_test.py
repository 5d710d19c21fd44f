import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion.schedules import Schedule

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


def test_clipping_is_off_unless_the_class_clips():
    without = {key: value for key, value in SD15.items() if key != "clip_sample"}
    assert Schedule.from_config(without).clip_sample_range is None
    assert Schedule.from_config(without | {"_class_name": "DDIMScheduler"}).clip_sample_range == 1.0


def test_unsupported_fields_are_listed_together():
    with pytest.raises(ValueError, match="thresholding=True.*prediction_type='flow'") as error:
        Schedule.from_config(SD15 | {"thresholding": True, "prediction_type": "flow", "shift": 3.0})
    assert "shift=3.0 (unknown field)" in str(error.value)


def test_step_counts_out_of_range():
    schedule = Schedule.from_config(SD15)
    with pytest.raises(ValueError, match="is 1001; this schedule takes 1 to 1000"):
        schedule.timesteps(1001)
    with pytest.raises(ValueError, match="timestep 1000, beyond the last one, 999"):
        schedule.timesteps(1000)
