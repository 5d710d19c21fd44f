"""Samplers against diffusers' schedulers, driven by the same denoiser from the same noise."""

import functools
import inspect
import re
import sys
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.diffusion import samplers, schedules
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.weights import skeletons
from tests import twins

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmsolver_multistep": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "lcm": diffusers.LCMScheduler,
}
NAMES = tuple(SCHEDULERS)
RANDOM = ("euler_ancestral", "lcm")
SD = {
    "_class_name": "PNDMScheduler",
    "skip_prk_steps": True,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WEIGHT = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) * 0.4
NOISE = np.random.default_rng(1).normal(size=(2, 8, 8, 4)).astype(np.float32)
FAST = {"xla_backend_optimization_level": "0"}  # to compile: a trajectory here takes no time to run
KEYS = jax.vmap(jax.random.key)(np.arange(7, 9))


def denoise_jax(latents, timesteps):
    scale = jnp.cos(timesteps.astype(jnp.float32) / 300)[:, None, None, None]
    return jnp.tanh(latents @ WEIGHT + 0.2) * scale


def denoise_torch(latents, timestep):  # [b, c, h, w]
    scale = torch.cos(timestep.float() / 300)
    hidden = torch.einsum("bchw,cd->bdhw", latents, torch.from_numpy(WEIGHT).to(latents.dtype))
    return torch.tanh(hidden + 0.2) * scale


def to_torch(latents):
    return torch.from_numpy(np.array(latents)).permute(0, 3, 1, 2)


@functools.cache
def step_noise(index):
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), (8, 8, 4)))
    return to_torch(draw(KEYS))


@torch.no_grad()
def run_diffusers(
    scheduler, noise, num_steps, denoise=denoise_torch, *, timesteps=None, start=0, double=False
):
    """Drives a scheduler as the pipelines do, with the noise of our steps.

    Args:
        timesteps: those of a part of the trajectory, where it is not the whole.
        start: the index of the first; latents in the middle are taken as they are.
        double: the scheduler's own code, in float64.
    """
    scheduler.set_timesteps(num_steps)
    latents = to_torch(noise)
    if start == 0:
        latents = latents * scheduler.init_noise_sigma
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    indices = iter(range(start, 10_000))
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: step_noise(next(indices)))
        if double:
            patch.setattr(
                module, "torch", SimpleNamespace(**vars(torch) | {"float32": torch.double})
            )
            scheduler.sigmas, latents = scheduler.sigmas.double(), latents.double()
        for timestep in scheduler.timesteps if timesteps is None else timesteps:
            prediction = denoise(scheduler.scale_model_input(latents, timestep), timestep)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents.permute(0, 2, 3, 1).numpy()


def run_ours(name, config, noise, num_steps, denoise=denoise_jax, span=(0.0, 1.0)):
    schedule, sampler = Schedule.from_config(config), samplers.find(name)

    @functools.partial(jax.jit, compiler_options=FAST)
    def program(noise):
        return sampler(denoise, schedule, noise, num_steps, keys=KEYS, span=span)

    latents = program(noise)
    assert latents.dtype == jnp.float32
    return np.asarray(latents)


def assert_equal_to_diffusers(name, config, num_steps=20):
    # Euler's method begins the squared cosine at sigma 20291. In float32 diffusers' steps then lose
    # 4e-4 of latents that end near 1, by its own steps in float64; ours lose 1e-6.
    double = name == "euler" and config["beta_schedule"] == "squaredcos_cap_v2"
    scheduler = SCHEDULERS[name].from_config(config)
    theirs = run_diffusers(scheduler, NOISE, num_steps, double=double)
    ours = run_ours(name, config, NOISE, num_steps)
    assert np.isfinite(theirs).all() and theirs.std() > 0.02
    # Where a schedule drives the latents far from 1 the bound is relative to them.
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace", "set_alpha_to_one": True, "steps_offset": 0},
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 0.7},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "steps_offset": 0},
        {"trained_betas": np.linspace(0.001, 0.02, 500).tolist(), "num_train_timesteps": 500},
    ],
    ids=lambda changes: ",".join(f"{key}={str(value)[:20]}" for key, value in changes.items()),
)
@pytest.mark.parametrize("name", NAMES)
def test_final_latents_equal_diffusers(name, changes, prediction_type):
    config = SD | changes | {"prediction_type": prediction_type}
    if prediction_type == "sample" and name in ("pndm", "euler_ancestral"):
        with pytest.raises(ValueError, match="prediction_type='sample' .supported: 'epsilon', 'v_"):
            samplers.check(name, Schedule.from_config(config), 20)
    else:
        assert_equal_to_diffusers(name, config)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_equals_diffusers(name, spacing):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    assert_equal_to_diffusers(name, SD | changes | {"prediction_type": "v_prediction"})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {
            "use_karras_sigmas": True,
            "final_sigmas_type": "sigma_min",
            "timestep_spacing": "leading",
        },
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
        {"use_karras_sigmas": True, "rescale_betas_zero_snr": True},
        {"sigma_min": 0.1, "sigma_max": 10.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["euler", "dpmsolver_multistep"])
def test_sigmas_equal_diffusers(name, changes, prediction_type):
    assert_equal_to_diffusers(name, SD | changes | {"prediction_type": prediction_type})


@pytest.mark.parametrize("num_steps", [3, 14, 15, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"solver_type": "heun", "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh2", "variance_type": "fixed_small"},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    ],
    ids=str,
)
def test_solvers_equal_diffusers(changes, num_steps):
    assert_equal_to_diffusers("dpmsolver_multistep", SD | changes, num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 50])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps_equals_diffusers(name, num_steps):
    assert_equal_to_diffusers(name, SD, num_steps)


@pytest.mark.parametrize("num_steps", [1, 4, 5, 7])
@pytest.mark.parametrize("changes", [{"original_inference_steps": 40}, {"timestep_scaling": 0.001}])
def test_lcm_fields_equal_diffusers(changes, num_steps):
    assert_equal_to_diffusers("lcm", SD | {"_class_name": "LCMScheduler"} | changes, num_steps)


def test_trailing_steps_are_as_many_as_asked_for():
    """np.arange, with which diffusers makes them, has one too many at some counts."""
    schedule = Schedule.from_config(SD | {"timestep_spacing": "trailing"})
    assert samplers.check("ddim", schedule, 61) == 61
    assert len(np.arange(1000, 0, -1000 / 61)) == 62


RELEASED = {
    "PNDM": skeletons._PNDM,
    "DDIM_V": skeletons._DDIM_V,
    "EULER": skeletons._EULER,
    "EULER_TURBO": skeletons._EULER_TURBO,
    "ANCESTRAL_TURBO": skeletons._ANCESTRAL_TURBO,
}


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("name", NAMES)
def test_files_of_released_models_equal_diffusers(name, kind):
    """As `Scheduler.from_config(pipeline.scheduler.config)` exchanges a pipeline's scheduler."""
    config = RELEASED[kind]
    own = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs = SCHEDULERS[name].from_config(own.config)
    if name == "pndm" and kind != "PNDM":
        assert not theirs.config.skip_prk_steps
        with pytest.raises(ValueError, match="skip_prk_steps=False .supported: True"):
            samplers.check(name, Schedule.from_config(config), 8)
        return
    final = run_diffusers(theirs, NOISE, 8)
    assert np.abs(run_ours(name, config, NOISE, 8) - final).max() <= 1e-4 * np.abs(final).max()


def test_defaults_of_the_class_that_wrote_a_file_are_not_of_the_file():
    config = dict(diffusers.DDIMScheduler(**{"beta_end": 0.012}).config)
    assert "timestep_spacing" in config["_use_default_values"]
    fields = Schedule.from_config(config).fields("EulerDiscreteScheduler")
    assert fields.timestep_spacing == "linspace"
    theirs = diffusers.EulerDiscreteScheduler.from_config(config)
    assert theirs.config.timestep_spacing == "linspace" and theirs.config.beta_end == 0.012


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A tiny random UNet in torch and in JAX, with the text embeddings of two prompts."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    theirs = twins.tiny_stable_diffusion(folder).unet
    backbone = Backbone.load(folder)
    hidden = np.random.default_rng(3).normal(size=(2, 12, 16)).astype(np.float32)
    conditioning = {"encoder_hidden_states": jnp.asarray(hidden)}
    return (
        lambda latents, timestep: theirs(latents, timestep, torch.from_numpy(hidden)).sample,
        lambda *args: backbone.denoise(backbone.params, *args, conditioning),
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_real_unet_equals_diffusers(name, unet):
    theirs = run_diffusers(SCHEDULERS[name].from_config(SD), NOISE, 5, unet[0])
    ours = run_ours(name, SD, NOISE, 5, unet[1])
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


def cut(scheduler, num_steps, fraction):
    """The parts of a trajectory before and after a fraction, as the SDXL pipelines take them."""
    scheduler.set_timesteps(num_steps)
    total = scheduler.config.num_train_timesteps
    cutoff = int(round(total - fraction * total))
    late = int((scheduler.timesteps < cutoff).sum())
    early = len([timestep for timestep in scheduler.timesteps if timestep >= cutoff])
    start = len(scheduler.timesteps) - late
    return scheduler.timesteps[:early], scheduler.timesteps[start:], start


@pytest.mark.parametrize(
    "config", [skeletons._EULER, SD | {"use_karras_sigmas": True}], ids=["released", "karras"]
)
@pytest.mark.parametrize("num_steps, fraction", [(20, 0.8), (7, 0.37)])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pndm"])
def test_a_hand_over_equals_diffusers(name, num_steps, fraction, config):
    base, refiner = (SCHEDULERS[name].from_config(config) for _ in range(2))
    early, late, start = cut(base, num_steps, fraction)
    assert 0 < len(early) < num_steps and 0 < len(late) < num_steps
    middle = run_diffusers(base, NOISE, num_steps, timesteps=early)
    end = run_diffusers(refiner, middle, num_steps, timesteps=late, start=start)
    ours = run_ours(name, config, NOISE, num_steps, span=(0.0, fraction))
    assert np.abs(ours - middle).max() <= 1e-4 * np.abs(middle).max()
    ours = run_ours(name, config, ours, num_steps, span=(fraction, 1.0))
    assert np.abs(ours - end).max() <= 1e-4 * np.abs(end).max()
    schedule = Schedule.from_config(config)
    counts = [samplers.check(name, schedule, num_steps, s) for s in [(0, fraction), (fraction, 1)]]
    assert counts == [len(early), len(late)]


def test_pndm_repeats_a_timestep_after_a_hand_over():
    base, refiner = (diffusers.PNDMScheduler.from_config(SD) for _ in range(2))
    early, late, _ = cut(base, 20, 0.8)
    late = torch.cat([late[:2], late[1:]])  # what step() counts on where it begins
    middle = run_diffusers(base, NOISE, 20, timesteps=early)
    end = run_diffusers(refiner, middle, 20, timesteps=late)
    ours = run_ours("pndm", SD, NOISE, 20, span=(0.0, 0.8))
    assert np.abs(ours - middle).max() <= 1e-4
    assert np.abs(run_ours("pndm", SD, ours, 20, span=(0.8, 1.0)) - end).max() <= 1e-4
    schedule = Schedule.from_config(SD)
    assert samplers.check("pndm", schedule, 20, (0.0, 0.8)) == len(early) == 17
    assert samplers.check("pndm", schedule, 20, (0.8, 1.0)) == len(late) == 5


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "lcm"])
def test_spans_join_to_the_whole_trajectory(name):
    whole = run_ours(name, SD, NOISE, 10)
    first = run_ours(name, SD, NOISE, 10, span=(0.0, 0.5))
    np.testing.assert_allclose(run_ours(name, SD, first, 10, span=(0.5, 1.0)), whole, atol=1e-6)


def test_spans_out_of_range():
    schedule = Schedule.from_config(SD)
    for span in [(0.8, 0.8), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)]:
        with pytest.raises(ValueError, match="0 <= start < end <= 1, got"):
            samplers.check("euler", schedule, 20, span)
    with pytest.raises(ValueError, match="None of 4 steps lies in the span .0.8, 1.0.: take more"):
        samplers.check("lcm", schedule, 4, (0.8, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_stands_once_in_the_program(name):
    schedule, latents = Schedule.from_config(SD), jnp.zeros((2, 2, 2, 4))
    evaluations = []

    def denoise(latents, timesteps):
        jax.debug.callback(lambda t: evaluations.append(float(t)), timesteps[0])
        return denoise_jax(latents, timesteps)

    run = jax.jit(lambda x: samplers.find(name)(denoise, schedule, x, 20, keys=KEYS))
    assert str(run.trace(latents).jaxpr).count("tanh") == 1
    run(latents).block_until_ready()
    jax.effects_barrier()
    expected = 21 if name == "pndm" else 20
    assert len(evaluations) == samplers.check(name, schedule, 20) == expected


@pytest.mark.parametrize("name", RANDOM)
def test_noise_depends_on_a_rows_key_and_step_alone(name):
    schedule = Schedule.from_config(SD)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(noise, keys):
        return samplers.find(name)(denoise_jax, schedule, noise, 5, keys=keys)

    both = run(NOISE, KEYS)
    np.testing.assert_allclose(run(NOISE[::-1], KEYS[::-1]), both[::-1], atol=1e-6)
    np.testing.assert_allclose(run(NOISE[1:], KEYS[1:]), both[1:], atol=1e-6)
    assert np.abs(run(NOISE, KEYS[::-1]) - both).max() > 0.1
    with pytest.raises(ValueError, match=f"{name} draws noise at each step: give `keys`"):
        samplers.find(name)(denoise_jax, schedule, NOISE, 5)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_scheduler_is_read_or_stands_in_a_table(name, monkeypatch):
    scheduler = SCHEDULERS[name].__name__
    parameters = inspect.signature(SCHEDULERS[name].__init__).parameters
    theirs = {key: value.default for key, value in parameters.items() if key != "self"}
    hidden = {"sigma_min", "sigma_max"} if name == "dpmsolver_multistep" else set()
    ours = schedules.SCHEDULERS[scheduler]
    assert {key: value for key, value in ours.items() if key not in hidden} == theirs

    read = set()

    class Recorder(SimpleNamespace):
        def __getattribute__(self, field):
            read.add(field)
            return super().__getattribute__(field)

    monkeypatch.setattr(schedules, "SimpleNamespace", Recorder)
    config = SD | {"use_karras_sigmas": True, "clip_sample": True, "rescale_betas_zero_snr": True}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    config |= {"final_sigmas_type": "sigma_min"}
    samplers.check(name, Schedule.from_config(config), 10)
    no_effect = schedules.NO_EFFECT[""] | schedules.NO_EFFECT.get(scheduler, {})
    # Those of alphas_cumprod, which the namespace holds.
    noise = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
    checked = {key for key in ours if key in schedules.SUPPORTED}
    assert set(ours) - read - noise - checked - set(no_effect) == set()
    assert not read & set(no_effect)


REFUSED = {
    "ddim": {"thresholding": True, "timestep_spacing": "even"},
    "euler": {
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
        "interpolation_type": "log_linear",
        "timestep_type": "continuous",
        "final_sigmas_type": "one",
    },
    "euler_ancestral": {"timestep_spacing": "even"},
    "dpmsolver_multistep": {
        "thresholding": True,
        "solver_order": 3,
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "rk",
        "use_lu_lambdas": True,
        "use_flow_sigmas": True,
        "use_exponential_sigmas": True,
        "use_beta_sigmas": True,
        "lambda_min_clipped": -5.1,
        "variance_type": "learned_range",
    },
    "pndm": {"skip_prk_steps": False},
    "lcm": {"thresholding": True},
}


@pytest.mark.parametrize(
    "name, field, value",
    [(name, *item) for name, fields in REFUSED.items() for item in fields.items()],
)
def test_unsupported_fields_are_refused_by_name_by_those_that_have_them(name, field, value):
    schedule = Schedule.from_config(SD | {field: value})
    for other in NAMES:
        if field in schedules.SCHEDULERS[SCHEDULERS[other].__name__]:
            if field == "timestep_spacing" and other == "lcm":
                continue  # it has no use for it
            with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} (supported: ")):
                samplers.check(other, schedule, 20)
        else:
            samplers.check(other, schedule, 20)


@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_noise_tells_nothing_where_no_signal_is_left(name):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="rescale_betas_zero_snr has left no signal"):
        samplers.check(name, Schedule.from_config(SD | changes), 20)


def test_step_counts_out_of_range():
    schedule = Schedule.from_config(SD)
    for name, most in [("ddim", 1000), ("euler", 1000), ("dpmsolver_multistep", 999)]:
        for count in (0, most + 1):
            with pytest.raises(ValueError, match=f"is {count}; this schedule takes 1 to {most}"):
                samplers.check(name, schedule, count)
    with pytest.raises(ValueError, match="steps_offset 1 go from timestep 1000 to 1, beyond 0 to"):
        samplers.check("ddim", schedule, 1000)
    with pytest.raises(ValueError, match="is 51: LCM takes 1 to original_inference_steps, 50, of"):
        samplers.check("lcm", schedule, 51)


def test_names():
    for name, scheduler in SCHEDULERS.items():
        assert samplers.of_scheduler(scheduler.__name__) == name
        assert samplers.find(name).__name__ == name
    schedule = Schedule.from_config(SD)
    assert samplers.of_scheduler(schedule.scheduler) == "pndm"
    for ask in (samplers.find, lambda name: samplers.check(name, schedule, 20)):
        with pytest.raises(ValueError, match="'ddpm'.*ddim, dpmsolver_multistep, euler, euler_anc"):
            ask("ddpm")
    with pytest.raises(ValueError, match="HeunDiscreteScheduler, only for DDIM.*sample.sampler"):
        samplers.of_scheduler("HeunDiscreteScheduler")
