"""The aesthetic head equals torch's Sequential, with random weights and with LAION's own."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from agfsync_jax.scorers.aesthetic import load_head

REAL = Path(__file__).parents[2].parent / "shared/data/sac+logos+ava1-l14-linearMSE.pth"


class Twin(torch.nn.Module):
    def __init__(self, size: int):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        self.layers = torch.nn.Sequential(
            linear(size, 1024),
            dropout(0.2),
            linear(1024, 128),
            dropout(0.2),
            linear(128, 64),
            dropout(0.1),
            linear(64, 16),
            linear(16, 1),
        )

    def forward(self, x):
        return self.layers(x)


def embeddings(size: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(7, size)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scores(path: Path, x: np.ndarray) -> np.ndarray:
    graph, params = load_head(path)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graph, p)(x))(params, jnp.asarray(x)))


@pytest.mark.parametrize("size", [32, 768])
def test_equals_torch(tmp_path, size):
    torch.manual_seed(0)
    twin = Twin(size).eval()
    save_file(twin.state_dict(), tmp_path / "head.safetensors")
    x = embeddings(size)
    with torch.no_grad():
        expected = twin(torch.from_numpy(x)).numpy()[:, 0]
    actual = scores(tmp_path / "head.safetensors", x)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not there")
def test_the_published_weights(tmp_path):
    state = torch.load(REAL, weights_only=True, map_location="cpu")
    save_file(state, tmp_path / "head.safetensors")
    twin = Twin(768).eval()
    twin.load_state_dict(state)
    x = embeddings(768)
    with torch.no_grad():
        expected = twin(torch.from_numpy(x)).numpy()[:, 0]
    actual = scores(tmp_path / "head.safetensors", x)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert np.all((actual > 0) & (actual < 10))


def test_a_file_that_is_no_head(tmp_path):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.weight"):
        load_head(tmp_path / "other.safetensors")
    state = Twin(16).state_dict()
    state["layers.7.weight"] = torch.zeros(1, 4)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"layers\.7\.weight: \[1, 4\], expected \[1, 16\]"):
        load_head(tmp_path / "bad.safetensors")
