"""Validation with the shipped models: the same pictures every time, scored and laid out."""

from pathlib import Path

import jax
import numpy as np
import pytest

from agfsync_jax import backbones
from agfsync_jax.parallel.mesh import create_mesh
from agfsync_jax.training.validation import HeldOutPairs, Validation, draw_grid
from configs import micro


def test_scores_and_pictures_follow_the_denoiser():
    config = micro.get_config("tiny")
    config.sample.num_inference_steps = 2
    config.train.num_validation_prompts = 5
    del config.scorers.vqa, config.scorers.aesthetic
    mesh = create_mesh({"data": 1}, devices=jax.devices()[:1])
    backbone = backbones.load(config, mesh)
    denoiser = backbone.params.pop("unet")
    config.sample.device_batch_size = 5
    validation = Validation(config, Path(), mesh, backbone)
    scores, grid = validation({"unet": denoiser})
    again, same = validation({"unet": denoiser})
    assert list(scores) == ["clip"] and scores == again
    np.testing.assert_array_equal(grid, same)
    assert grid.shape == (2 * (128 + 14), 4 * 128, 3)
    other, _ = validation({"unet": jax.tree.map(lambda x: x * 0.5, denoiser)})
    assert abs(other["clip"] - scores["clip"]) > 1
    config.train.num_validation_prompts = 0
    with pytest.raises(ValueError, match="expected one a process, 1"):
        Validation(config, Path(), mesh, backbone)


def test_a_grid_has_captions():
    images = np.zeros((5, 200, 200, 3), np.uint8)
    grid = draw_grid(images, ["a" * 500, "b", "", "d", "e"])
    assert grid.shape == (2 * 214, 800, 3)
    assert (grid[200:214, :200] < 128).any() and (grid[200:214, 400:600] == 255).all()
    assert (grid[214:, 200:] == 255).all()  # no image there


def test_batches_of_held_out_pairs_have_their_weights():
    def program(state, frozen, batch, draw):
        assert (state, frozen, batch) == ("state", "frozen", 10 * draw)
        return {"loss": draw + 1.0, "rewards/margin": draw, "grad_norm": 7.0}

    held_out = HeldOutPairs(program, lambda index: 10 * index, np.array([1.0, 3.0]))
    assert held_out("state", "frozen") == {"held_out/loss": 1.75, "held_out/margin": 0.75}
