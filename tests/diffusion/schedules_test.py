import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from agfsync_jax.diffusion.schedules import PARAMETERIZATIONS, SCHEDULERS, Schedule

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


def test_clipping_is_off_unless_the_file_or_ddims_default_clips():
    without = {key: value for key, value in SD15.items() if key != "clip_sample"}
    for config, clips in [(SD15, False), (without, True), (SD15 | {"clip_sample": True}, True)]:
        theirs = diffusers.DDIMScheduler.from_config(config).config.clip_sample
        assert Schedule.from_config(config).fields("DDIMScheduler").clip_sample == clips == theirs


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": True}, {"use_lu_lambdas": 0}])
def test_fields_are_those_of_diffusers_from_config(scheduler, changes):
    config = SD15 | changes
    theirs = getattr(diffusers, scheduler).from_config(config)
    fields = vars(Schedule.from_config(config).fields(scheduler))
    alphas = fields.pop("alphas_cumprod")
    assert len(fields) >= 9
    for name, value in fields.items():
        assert value == theirs.config.get(name), name
    last = -1 if changes.get("rescale_betas_zero_snr") else None  # some make it 2 ** -24
    expected = theirs.alphas_cumprod.numpy()[:last]
    np.testing.assert_allclose(alphas[:last], expected, rtol=1e-4, atol=1e-7)


def test_a_file_of_any_class_that_shares_the_noise_can_be_read():
    # Without one of another noise, and one whose class needs one more library.
    others = {"EDMEulerScheduler", "DPMSolverSDEScheduler"}
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name in others:
            continue
        config = dict(getattr(diffusers, scheduler.name)(beta_end=0.012).config)
        config["_class_name"] = scheduler.name
        schedule = Schedule.from_config(config)
        assert schedule.scheduler == scheduler.name
        fields = schedule.fields("EulerDiscreteScheduler")
        theirs = diffusers.EulerDiscreteScheduler.from_config(config)
        assert {key: getattr(fields, key) for key in ("timestep_spacing", "beta_end")} == {
            key: theirs.config[key] for key in ("timestep_spacing", "beta_end")
        }


def test_unknown_fields_and_kinds_of_noise_are_listed_together():
    changes = {"prediction_type": "flow", "beta_schedule": "sigmoid", "shift": 3.0}
    with pytest.raises(ValueError, match="prediction_type='flow'.*beta_schedule='sig") as error:
        Schedule.from_config(SD15 | changes)
    assert "shift=3.0 (unknown field)" in str(error.value)
    with pytest.raises(ValueError, match="2 trained_betas for 1000 timesteps"):
        Schedule.from_config(SD15 | {"trained_betas": [0.1, 0.2]})


def test_unsupported_fields_are_listed_together():
    schedule = Schedule.from_config(SD15 | {"thresholding": True, "timestep_spacing": "even"})
    with pytest.raises(ValueError, match="thresholding=True.*; timestep_spacing='even'.*change"):
        schedule.fields("DDIMScheduler")
