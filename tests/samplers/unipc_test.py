import numpy as np
import pytest

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.samplers import unipc
from tests.schedulers import NOISE, SD, assert_equal_to_diffusers, run_ours

TO_NOISE = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("num_steps", [2, 3, 8, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1"} | TO_NOISE,  # to sigma 0 diffusers gives NaN
        {"solver_type": "bh1", "solver_order": 3} | TO_NOISE,
        {"solver_type": "midpoint"},
        {"disable_corrector": [0, 2]},
        {"predict_x0": False} | TO_NOISE,
        {"predict_x0": False, "solver_type": "bh1", "prediction_type": "v_prediction"} | TO_NOISE,
        {"lower_order_final": False, "solver_order": 3} | TO_NOISE,
        {"solver_order": 3, "prediction_type": "v_prediction", "use_karras_sigmas": True},
    ],
    ids=str,
)
def test_solvers_equal_diffusers(changes, num_steps):
    assert_equal_to_diffusers("unipc", SD | changes, num_steps)


def test_bh1_reaches_sigma_0():
    latents = run_ours("unipc", SD | {"solver_type": "bh1"}, NOISE, 20)
    close = run_ours("unipc", SD, NOISE, 20)
    assert np.abs(latents - close).max() < 0.05 * np.abs(close).max()


@pytest.mark.parametrize(
    "changes",
    [
        {"predict_x0": False},
        {"lower_order_final": False},
        {"lower_order_final": False, "solver_order": 3, "use_karras_sigmas": True} | TO_NOISE,
    ],
)
def test_a_last_step_of_no_finite_length_is_refused(changes):
    with pytest.raises(ValueError, match="last step, from sigma .*lower_order_final"):
        unipc.SAMPLER.steps(Schedule.from_config(SD | changes), 20)
