import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.losses import cdpo, diffusion_dpo

ERRORS = [jnp.array(x) for x in ([0.1, 0.4], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2])]


def test_without_smoothing_it_is_diffusion_dpo():
    result = cdpo.loss(*ERRORS, beta=10.0, label_smoothing=0.0)
    expected = diffusion_dpo.loss(*ERRORS, beta=10.0)
    np.testing.assert_array_equal(result[0], expected[0])


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0])
def test_a_share_that_says_nothing_is_an_error(share):
    with pytest.raises(ValueError, match=f"label_smoothing is {share}, expected at least 0"):
        cdpo.loss(*ERRORS, label_smoothing=share)
