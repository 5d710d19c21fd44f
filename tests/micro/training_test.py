"""The suite's trainer: it learns, goes on where it was stopped, and lets no error pass."""

import jax.numpy as jnp
import numpy as np
import pytest

from agfsync_jax.micro import training


def make_batch(rng):
    x = rng.standard_normal((32, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}


def loss_fn(params, batch, _):
    return jnp.square(batch["x"] @ params["w"] - batch["y"]).mean()


def fit(workdir, make=make_batch, steps=60):
    params = {"w": jnp.zeros(3)}
    rates = {"learning_rate": 0.2, "ema": 0.5}
    return training.fit("line", workdir, params, loss_fn, make, steps=steps, **rates)


def test_it_learns(tmp_path):
    assert np.allclose(fit(tmp_path)["w"], [1.0, -2.0, 0.5], atol=0.1)


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 20)
    expected = fit(tmp_path / "whole")["w"]
    seen = 0

    def stops(rng):
        nonlocal seen
        seen += 1
        if seen > 45:
            raise OSError("the power is gone")
        return make_batch(rng)

    with pytest.raises(OSError, match="power"):
        fit(tmp_path / "stopped", stops)
    seen = -1000
    assert np.array_equal(fit(tmp_path / "stopped", stops)["w"], expected)
    assert seen == -1000 + 20  # from step 40 on


def test_a_loss_that_is_not_finite_stops(tmp_path):
    def broken(rng):
        return make_batch(rng) | {"y": np.full(32, np.inf, np.float32)}

    with pytest.raises(FloatingPointError, match="line"):
        fit(tmp_path, broken)
