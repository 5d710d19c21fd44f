"""Every sampler of the room against the scheduler of diffusers that it names.

The folder is walked: a new file is tested once it exists.
"""

import functools
import inspect
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from agfsync_jax import samplers
from agfsync_jax.backbones.stable_diffusion import Backbone
from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.diffusion.trajectories import Fields
from agfsync_jax.samplers import ddim, dpmsolver_multistep, lcm
from agfsync_jax.weights import skeletons
from tests import twins
from tests.schedulers import (
    FAST,
    KEYS,
    NOISE,
    SAMPLERS,
    SD,
    assert_equal_to_diffusers,
    cut,
    denoise_jax,
    run_diffusers,
    run_ours,
    scheduler_of,
)

NAMES = tuple(SAMPLERS)
RANDOM = [name for name in NAMES if SAMPLERS[name].draws_noise]
OF_SIGMAS = [name for name in NAMES if "use_karras_sigmas" in SAMPLERS[name].defaults]


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
    if prediction_type not in SAMPLERS[name].supported.get("prediction_type", (prediction_type,)):
        with pytest.raises(ValueError, match="prediction_type='sample' .supported: 'epsilon', 'v_"):
            SAMPLERS[name].steps(Schedule.from_config(config), 20)
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
@pytest.mark.parametrize("name", OF_SIGMAS)
def test_sigmas_equal_diffusers(name, changes, prediction_type):
    assert_equal_to_diffusers(name, SD | changes | {"prediction_type": prediction_type})


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 50])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps_equals_diffusers(name, num_steps):
    assert_equal_to_diffusers(name, SD, num_steps)


def test_trailing_steps_are_as_many_as_asked_for():
    """np.arange, with which diffusers makes them, has one too many at some counts."""
    schedule = Schedule.from_config(SD | {"timestep_spacing": "trailing"})
    assert ddim.SAMPLER.num_calls(schedule, 61) == 61
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
    theirs = scheduler_of(name, own.config)
    if name == "pndm" and kind != "PNDM":
        assert not theirs.config.skip_prk_steps
        with pytest.raises(ValueError, match="skip_prk_steps=False .supported: True"):
            SAMPLERS[name].steps(Schedule.from_config(config), 8)
        return
    final = run_diffusers(theirs, NOISE, 8)
    assert np.abs(run_ours(name, config, NOISE, 8) - final).max() <= 1e-4 * np.abs(final).max()


@pytest.mark.parametrize("kind", RELEASED)
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_is_written_is_diffusers_own(name, kind, tmp_path):
    file = SAMPLERS[name].file(Schedule.from_config(RELEASED[kind]))
    theirs = scheduler_of(name, RELEASED[kind])
    theirs.save_config(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    ours = json.loads(json.dumps(file))
    for config in (saved, ours):
        del config["_diffusers_version"]
        for field in ("sigma_min", "sigma_max"):  # read, but not named, by some classes
            if config.get(field, 0) is None:
                del config[field]
    assert ours == saved
    assert SAMPLERS[name].is_of(Schedule.from_config(ours))


def test_defaults_of_the_class_that_wrote_a_file_are_not_of_the_file():
    config = dict(diffusers.DDIMScheduler(**{"beta_end": 0.012}).config)
    assert "timestep_spacing" in config["_use_default_values"]
    fields = SAMPLERS["euler"].fields(Schedule.from_config(config))
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
    theirs = run_diffusers(scheduler_of(name, SD), NOISE, 5, unet[0])
    ours = run_ours(name, SD, NOISE, 5, unet[1])
    assert theirs.std() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize(
    "config", [skeletons._EULER, SD | {"use_karras_sigmas": True}], ids=["released", "karras"]
)
@pytest.mark.parametrize("num_steps, fraction", [(20, 0.8), (7, 0.37)])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("heun", "pndm")])
def test_a_hand_over_equals_diffusers(name, num_steps, fraction, config):
    base, refiner = (scheduler_of(name, config) for _ in range(2))
    early, late, start = cut(base, num_steps, fraction)
    assert 0 < len(early) < num_steps and 0 < len(late) < num_steps
    middle = run_diffusers(base, NOISE, num_steps, timesteps=early)
    end = run_diffusers(refiner, middle, num_steps, timesteps=late, start=start)
    ours = run_ours(name, config, NOISE, num_steps, span=(0.0, fraction))
    assert np.abs(ours - middle).max() <= 1e-4 * np.abs(middle).max()
    ours = run_ours(name, config, ours, num_steps, span=(fraction, 1.0))
    assert np.abs(ours - end).max() <= 1e-4 * np.abs(end).max()
    schedule = Schedule.from_config(config)
    spans = (0, fraction), (fraction, 1)
    counts = [SAMPLERS[name].num_calls(schedule, num_steps, span) for span in spans]
    assert counts == [len(early), len(late)]


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "lcm"])
def test_spans_join_to_the_whole_trajectory(name):
    whole = run_ours(name, SD, NOISE, 10)
    first = run_ours(name, SD, NOISE, 10, span=(0.0, 0.5))
    joined = run_ours(name, SD, first, 10, span=(0.5, 1.0))
    assert np.abs(joined - whole).max() <= 1e-6 * np.abs(whole).max()  # other programs round apart


def test_spans_out_of_range():
    schedule = Schedule.from_config(SD)
    for span in [(0.8, 0.8), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)]:
        with pytest.raises(ValueError, match="0 <= start < end <= 1, got"):
            ddim.SAMPLER.steps(schedule, 20, span)
    with pytest.raises(ValueError, match="None of 4 steps lies in the span .0.8, 1.0.: take more"):
        lcm.SAMPLER.steps(schedule, 4, (0.8, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_stands_once_in_the_program(name):
    schedule, latents = Schedule.from_config(SD), jnp.zeros((2, 2, 2, 4))
    evaluations = []

    def denoise(latents, timesteps):
        jax.debug.callback(lambda t: evaluations.append(float(t)), timesteps[0])
        return denoise_jax(latents, timesteps)

    run = jax.jit(lambda x: SAMPLERS[name](denoise, schedule, x, 20, keys=KEYS))
    assert str(run.trace(latents).jaxpr).count("tanh") == 1
    run(latents).block_until_ready()
    jax.effects_barrier()
    theirs = scheduler_of(name, SD)
    theirs.set_timesteps(20)
    assert len(evaluations) == SAMPLERS[name].num_calls(schedule, 20) == len(theirs.timesteps)


@pytest.mark.parametrize("name", RANDOM)
def test_noise_depends_on_a_rows_key_and_step_alone(name):
    schedule = Schedule.from_config(SD)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(noise, keys):
        return SAMPLERS[name](denoise_jax, schedule, noise, 5, keys=keys)

    both = run(NOISE, KEYS)
    rounding = 1e-6 * np.abs(both).max()  # processors take a product of one row by another order
    np.testing.assert_allclose(run(NOISE[::-1], KEYS[::-1]), both[::-1], rtol=0, atol=rounding)
    np.testing.assert_allclose(run(NOISE[1:], KEYS[1:]), both[1:], rtol=0, atol=rounding)
    assert np.abs(run(NOISE, KEYS[::-1]) - both).max() > 0.1
    with pytest.raises(ValueError, match="draws noise at each step: give `keys`"):
        SAMPLERS[name](denoise_jax, schedule, NOISE, 5)


NOISE_FIELDS = {
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_the_class_is_read_or_stands_in_a_table(name, monkeypatch):
    sampler = SAMPLERS[name]
    parameters = inspect.signature(getattr(diffusers, sampler.scheduler).__init__).parameters
    theirs = {key: value.default for key, value in parameters.items() if key != "self"}
    hidden = {"sigma_min", "sigma_max"} - set(theirs)
    ours = {key: value for key, value in sampler.defaults.items() if key not in hidden}
    assert ours == theirs

    read = set()

    class Recorder(Fields):
        def __getattribute__(self, field):
            read.add(field)
            return super().__getattribute__(field)

    monkeypatch.setattr(samplers, "Fields", Recorder)
    config = SD | {"use_karras_sigmas": True, "clip_sample": True, "rescale_betas_zero_snr": True}
    config |= {"prediction_type": "v_prediction", "timestep_spacing": "leading"}
    config |= {"final_sigmas_type": "sigma_min"}
    sampler.steps(Schedule.from_config(config), 10)
    no_effect = samplers.NO_EFFECT | sampler.no_effect
    # What makes alphas_cumprod, which the namespace holds, and what is one value or refused.
    checked = NOISE_FIELDS | set(samplers.SUPPORTED) | set(sampler.supported)
    assert set(sampler.defaults) - read - checked - set(no_effect) == set()
    assert not read & set(no_effect)
    assert set(sampler.no_effect) | set(sampler.supported) <= set(sampler.defaults)


@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": True}, {"use_lu_lambdas": 0}])
@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_diffusers_from_config(name, changes):
    config = SD | changes
    theirs = scheduler_of(name, config)
    fields = vars(SAMPLERS[name].fields(Schedule.from_config(config)))
    alphas = fields.pop("alphas_cumprod")
    assert len(fields) >= 9
    for field, value in fields.items():
        assert value == theirs.config.get(field), field
    last = -1 if changes.get("rescale_betas_zero_snr") else None  # some make it 2 ** -24
    expected = theirs.alphas_cumprod.numpy()[:last]
    np.testing.assert_allclose(alphas[:last], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_s_own_noise_is_read_from_a_file_that_is_silent(name):
    """Training takes its noise from the file, too."""
    theirs = getattr(diffusers, SAMPLERS[name].scheduler)()
    schedule = samplers.read_schedule({"_class_name": SAMPLERS[name].scheduler})
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4)


REFUSED = {
    "timestep_spacing": "even",
    "thresholding": True,
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "final_sigmas_type": "one",
    "interpolation_type": "log_linear",
    "timestep_type": "continuous",
    "solver_order": 9,
    "algorithm_type": "dpmsolver",
    "solver_type": "rk",
    "use_lu_lambdas": True,
    "use_flow_sigmas": True,
    "lambda_min_clipped": -5.1,
    "variance_type": "learned_range",
    "skip_prk_steps": False,
    "solver_p": "DDIMScheduler",
    "shift_terminal": 0.1,
}


@pytest.mark.parametrize("field, value", REFUSED.items())
@pytest.mark.parametrize("name", NAMES)
def test_unsupported_fields_are_refused_by_name_by_those_that_have_them(name, field, value):
    sampler, schedule = SAMPLERS[name], Schedule.from_config(SD | {field: value})
    if field in sampler.defaults:
        with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} (supported: ")):
            sampler.steps(schedule, 20)
    else:
        sampler.steps(schedule, 20)


def test_every_refused_value_is_tried():
    tables = [samplers.SUPPORTED, *(each.supported for each in SAMPLERS.values())]
    assert set().union(*tables) - {"prediction_type"} == set(REFUSED)


@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_noise_tells_nothing_where_no_signal_is_left(name):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="rescale_betas_zero_snr has left no signal"):
        SAMPLERS[name].steps(Schedule.from_config(SD | changes), 20)


def test_step_counts_out_of_range():
    schedule = Schedule.from_config(SD)
    for module, most in [(ddim, 1000), (dpmsolver_multistep, 999)]:
        for count in (0, most + 1):
            with pytest.raises(ValueError, match=f"is {count}; this schedule takes 1 to {most}"):
                module.SAMPLER.steps(schedule, count)
    with pytest.raises(ValueError, match="steps_offset 1 go from timestep 1000 to 1, beyond 0 to"):
        ddim.SAMPLER.steps(schedule, 1000)
    with pytest.raises(ValueError, match="is 51: LCM takes 1 to original_inference_steps, 50, of"):
        lcm.SAMPLER.steps(schedule, 51)


def test_a_file_names_its_sampler():
    for name, sampler in SAMPLERS.items():
        schedule = Schedule.from_config({"_class_name": sampler.scheduler, **sampler.variant})
        assert samplers.find("", schedule) is samplers.find(name, schedule) is sampler
    with pytest.raises(ValueError, match="'ddpm' is not in agfsync_jax/samplers, which has: ddim"):
        samplers.find("ddpm", schedule)
    schedule = Schedule.from_config({"_class_name": "DDPMScheduler"})
    with pytest.raises(ValueError, match="of DDPMScheduler; there are ddim .DDIM.*sample.sampler"):
        samplers.find("", schedule)


def test_one_class_may_have_several_samplers():
    config = SD | {"_class_name": "DPMSolverMultistepScheduler"}
    assert samplers.find("", Schedule.from_config(config)) is dpmsolver_multistep.SAMPLER
    schedule = Schedule.from_config(config | {"algorithm_type": "dpmsolver"})
    with pytest.raises(ValueError, match="Scheduler, algorithm_type='dpmsolver[+][+]'.*name one"):
        samplers.find("", schedule)
    # Whoever names one means it, whatever form of DPM-Solver++ the file has.
    schedule = Schedule.from_config(config | {"algorithm_type": "sde-dpmsolver++"})
    fields = samplers.find("dpmsolver_multistep", schedule).fields(schedule)
    assert fields.algorithm_type == "dpmsolver++"


def test_a_file_of_any_class_that_shares_the_noise_can_be_read():
    # Without one of another noise, and one whose class needs one more library.
    others = {"EDMEulerScheduler", "DPMSolverSDEScheduler"}
    for scheduler in KarrasDiffusionSchedulers:
        if scheduler.name in others:
            continue
        config = dict(getattr(diffusers, scheduler.name)(beta_end=0.012).config)
        config["_class_name"] = scheduler.name
        schedule = samplers.read_schedule(config)
        assert schedule.scheduler == scheduler.name
        fields = SAMPLERS["euler"].fields(schedule)
        theirs = diffusers.EulerDiscreteScheduler.from_config(config)
        assert {key: getattr(fields, key) for key in ("timestep_spacing", "beta_end")} == {
            key: theirs.config[key] for key in ("timestep_spacing", "beta_end")
        }


def test_unknown_fields_are_listed():
    with pytest.raises(ValueError, match="no sampler knows: shift=3.0, base_shift=0.5"):
        samplers.read_schedule(SD | {"shift": 3.0, "base_shift": 0.5})
    known = {"_use_default_values": ["shift"], "shift": 1.0}  # a default that changed nothing
    samplers.read_schedule(SD | known)
