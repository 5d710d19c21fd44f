import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.losses import diffusion_dpo, smpo

ERRORS = [jnp.array(x) for x in ([0.1, 0.4], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2])]


def test_far_apart_it_is_diffusion_dpo_and_equal_scores_teach_nothing():
    scores = jnp.array([[50.0, 0.0], [3.0, 3.0]])
    values, metrics = smpo.loss(*ERRORS, scores, beta=10.0)
    expected, wanted = diffusion_dpo.loss(*ERRORS, beta=10.0)
    np.testing.assert_allclose(values, [expected[0], np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(metrics["labels/strength"], [1, 0], atol=1e-7)
    np.testing.assert_allclose(metrics["rewards/chosen"][0], wanted["rewards/chosen"][0], rtol=1e-6)


def test_a_sensitivity_that_is_none():
    with pytest.raises(ValueError, match="gamma is 0.0, expected more than 0"):
        smpo.LOSS.configured(gamma=0.0)
