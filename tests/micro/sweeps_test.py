"""The sweeps over the micro suite."""

import pytest

from agfsync_jax import sweep
from agfsync_jax.utils import configs


@pytest.mark.parametrize(
    ("spec", "num_runs", "num_shared"),
    [
        ("micro_losses.py", 39, 1),
        ("micro_losses.py:rates", 26, 1),
        ("micro_science.py:candidates", 12, 4),
        ("micro_science.py:noise", 9, 3),
        ("micro_science.py:scorers", 12, 1),
        ("micro_science.py:strategies", 12, 1),
        ("micro_science.py:timesteps", 12, 1),
        ("micro_science.py:controls", 6, 1),
        ("micro_science.py:rounds", 15, 1),
    ],
)
def test_every_run_of_them_can_be(spec, num_runs, num_shared, tmp_path):
    spec = f"configs/{spec}"
    found = sweep.plan(spec, {}, configs.sweep(spec), tmp_path)
    assert len(found) == num_runs and len(sweep.shared_by(found)) == num_shared
    sweep.check([part for part in found if part.config.train.seed == 0], num_devices=None)
