import pytest

from tests.schedulers import SD, assert_equal_to_diffusers


@pytest.mark.parametrize("num_steps", [1, 4, 5, 7])
@pytest.mark.parametrize("changes", [{"original_inference_steps": 40}, {"timestep_scaling": 0.001}])
def test_lcm_fields_equal_diffusers(changes, num_steps):
    assert_equal_to_diffusers("lcm", SD | {"_class_name": "LCMScheduler"} | changes, num_steps)
