"""Learning rates, and settings that are refused."""

import math

import numpy as np
import pytest

from agfsync_jax.training.optimizer import make_optimizer


def test_learning_rate_schedules():
    with pytest.raises(ValueError, match="warmup_steps=9 .* below train.num_steps=9"):
        make_optimizer(learning_rate=1, num_steps=9, warmup_steps=9, schedule="cosine")
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        make_optimizer(learning_rate=1, num_steps=9, max_grad_norm=0)
    _, rate = make_optimizer(learning_rate=2.0, num_steps=10, warmup_steps=2, schedule="cosine")
    got = [float(rate(step)) for step in range(11)]
    cosine = [1 + math.cos(math.pi * step / 8) for step in range(9)]
    np.testing.assert_allclose(got, [2 / 3, 4 / 3, *cosine], atol=1e-6)
    _, rate = make_optimizer(learning_rate=2.0, num_steps=10)
    assert float(rate(0)) == float(rate(9)) == 2.0
