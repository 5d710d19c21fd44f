import pytest

from tests.schedulers import SD, assert_equal_to_diffusers


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
@pytest.mark.parametrize("name", ["dpmsolver_multistep", "dpmsolver_sde"])
def test_solvers_equal_diffusers(name, changes, num_steps):
    assert_equal_to_diffusers(name, SD | changes, num_steps)
