"""Pictures: the same for a seed, in the palette's colors, worse where they are made so."""

import numpy as np
import pytest

from agfsync_jax.micro.drawing import DEGRADATIONS, degrade, render
from agfsync_jax.micro.grammar import (
    COLORS,
    parse_caption,
)
from agfsync_jax.micro.questions import (
    training_questions,
)
from agfsync_jax.micro.scenes import (
    mutate,
    sample_scenes,
)


def test_the_same_seed_gives_the_same_everything():
    def draw(seed):
        generator = np.random.default_rng(seed)
        scenes = sample_scenes(generator, 20, "all")
        images = [render(scene, generator) for scene in scenes]
        worse = [degrade(image, generator) for image in images]
        asked = [training_questions(scene, generator, 5) for scene in scenes]
        mutants = [mutate(scene, generator) for scene in scenes]
        return scenes, np.stack(images).tobytes(), np.stack(worse).tobytes(), asked, mutants

    assert draw(3) == draw(3)
    assert draw(3)[1] != draw(4)[1]


def test_objects_stay_inside_and_keep_the_color_of_the_palette():
    generator = np.random.default_rng(0)
    for scene in sample_scenes(generator, 200, "all"):
        image = render(scene, generator)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()
        for thing in scene.objects:
            differences = np.abs(image.astype(int) - np.array(COLORS[thing.color])[None, None])
            assert differences.max(-1).min() <= 8


def test_degradations_change_the_picture_and_refuse_unknown_names():
    generator = np.random.default_rng(0)
    scene = parse_caption("a large red ring on a brown background")
    image = render(scene, generator)
    for kind in DEGRADATIONS:
        worse = degrade(image, generator, kind)
        assert worse.shape == image.shape and worse.dtype == np.uint8
        assert np.abs(worse.astype(int) - image).mean() > 0.5
    with pytest.raises(ValueError, match="'rust' is unknown"):
        degrade(image, generator, "rust")
