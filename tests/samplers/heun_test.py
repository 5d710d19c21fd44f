import numpy as np
import pytest

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.samplers import heun
from tests.schedulers import NOISE, SD, assert_equal_to_diffusers, run_ours


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clipping_equals_diffusers(prediction_type, spacing):
    changes = {"clip_sample": True, "clip_sample_range": 0.3, "timestep_spacing": spacing}
    assert_equal_to_diffusers("heun", SD | changes | {"prediction_type": prediction_type})


@pytest.mark.parametrize("fraction", [0.5, 0.37])
def test_spans_hold_whole_steps(fraction):
    schedule = Schedule.from_config(SD)
    early, late = (heun.SAMPLER.num_calls(schedule, 10, s) for s in [(0, fraction), (fraction, 1)])
    assert early % 2 == 0 and late % 2 == 1 and early + late == 2 * 10 - 1
    whole = run_ours("heun", SD, NOISE, 10)
    first = run_ours("heun", SD, NOISE, 10, span=(0.0, fraction))
    second = run_ours("heun", SD, first, 10, span=(fraction, 1.0))
    np.testing.assert_allclose(second, whole, atol=1e-6)
