import numpy as np
import pytest

from agfsync_jax.evaluators.referee import Evaluator
from agfsync_jax.micro import referee
from agfsync_jax.micro.drawing import render
from agfsync_jax.micro.grammar import BACKGROUNDS, KINDS
from agfsync_jax.micro.scenes import all_scenes, sample_scenes


def test_clean_renders_pass_and_shuffled_ones_fail():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 60, split="heldout", unique=True)
    images = np.stack([render(scene, rng) for scene in scenes])
    prompts = [scene.caption() for scene in scenes]

    right = Evaluator()(images, prompts, [[]] * 60)
    assert {column.shape for column in right.values()} == {(60,)}
    assert right["referee"].mean() >= 0.99
    assert right["referee_strict"].mean() >= 0.98

    wrong = Evaluator()(images, prompts[1:] + prompts[:1])
    assert wrong["referee_strict"].mean() == 0
    assert wrong["referee"].mean() < 0.7


def test_parts_agree_with_the_checks():
    rng = np.random.default_rng(1)
    scenes = {kind: all_scenes(kind)[0] for kind in KINDS}
    images = np.stack([render(scene, rng) for scene in scenes.values()])
    columns = Evaluator()(images, [scene.caption() for scene in scenes.values()])
    single, pair, count = range(3)
    # The kinds that a scene has, and no others.
    assert np.isnan(columns["referee/spatial"][[single, count]]).all()
    assert np.isnan(columns["referee/size"][[pair, count]]).all()
    assert columns["referee/spatial"][pair] == columns["referee/size"][single] == 1

    # A background of another color fails that check and, alone, no other.
    gray = images[single].copy()
    flat = (gray == gray[0, 0]).all(-1)
    gray[flat] = BACKGROUNDS["gray"]
    scene = scenes["single"]
    assert scene.background != "gray"
    changed = Evaluator()(gray[None], [scene.caption()])
    assert changed["referee/background"][0] == 0
    assert changed["referee_strict"][0] == 0
    checks = referee.judge(gray, scene)
    assert changed["referee"][0] == pytest.approx(sum(checks.values()) / len(checks))


def test_prompt_outside_the_grammar():
    with pytest.raises(ValueError, match="not in the micro world's grammar"):
        Evaluator()(np.zeros((1, 64, 64, 3), np.uint8), ["a photo of a cat"])
