"""The referee accepts what shows a scene, and names each fault of what does not."""

import numpy as np
import pytest

from agfsync_jax.micro import referee
from agfsync_jax.micro.drawing import _blur, render
from agfsync_jax.micro.grammar import (
    parse_caption,
)
from agfsync_jax.micro.scenes import (
    mutate,
    sample_scene,
    sample_scenes,
)


def strict_rate(split: str, n: int, seed: int, change=lambda image, generator: image) -> float:
    generator = np.random.default_rng(seed)
    scenes = sample_scenes(generator, n, split)
    images = [change(render(scene, generator), generator) for scene in scenes]
    passed = [
        referee.strict(referee.judge(image, scene))
        for image, scene in zip(images, scenes, strict=True)
    ]
    return float(np.mean(passed))


def test_components_agree_with_a_flood_fill():
    generator = np.random.default_rng(5)
    for density in (0.2, 0.5, 0.6, 0.8):
        mask = generator.random((24, 30)) < density
        labels, number = referee.label_components(mask)
        expected = np.zeros(mask.shape, int)
        found = 0
        for start in zip(*np.nonzero(mask), strict=True):
            if expected[start]:
                continue
            found += 1
            stack = [start]
            while stack:
                y, x = stack.pop()
                if 0 <= y < 24 and 0 <= x < 30 and mask[y, x] and not expected[y, x]:
                    expected[y, x] = found
                    stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert number == found
        assert ((labels > 0) == mask).all()
        assert len(set(zip(labels[mask], expected[mask], strict=True))) == number


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_referee_accepts_fresh_renders(split):
    assert strict_rate(split, 400, seed=6) >= 0.995


def soften(image, generator):
    """What a good generator may still get wrong: soft edges, noise, a color cast, specks."""
    pixels = _blur(image.astype(np.float32), 0.7)
    pixels = pixels + generator.uniform(-25, 25, 3) + generator.normal(0, 6, pixels.shape)
    image = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    y, x = generator.integers(0, 62, 2)
    image[y : y + 2, x : x + 2] = generator.integers(0, 256, 3)
    return image


def test_the_referee_accepts_soft_pictures():
    assert strict_rate("heldout", 400, seed=7, change=soften) >= 0.97


@pytest.mark.parametrize("change", [lambda image, generator: image, soften])
def test_the_referee_rejects_every_other_caption(change):
    generator = np.random.default_rng(8)
    accepted = []
    for scene in sample_scenes(generator, 250, "all"):
        image = change(render(scene, generator), generator)
        other = sample_scene(generator, "all")
        for wrong in (mutate(scene, generator), other):
            if wrong != scene:
                accepted.append(referee.strict(referee.judge(image, wrong)))
    assert np.mean(accepted) < 0.005


def test_each_fault_fails_its_own_check():
    generator = np.random.default_rng(9)
    scene = parse_caption("a blue square above a red circle on a gray background")
    image = render(scene, generator)
    assert referee.mean(referee.judge(image, scene)) == 1

    def failed(caption, image=image):
        checks = referee.judge(image, parse_caption(caption))
        return {key for key, passed in checks.items() if not passed}

    assert failed("a blue square above a red circle on a white background") == {"background"}
    assert failed("a blue square below a red circle on a gray background") == {"spatial"}
    assert failed("a green square above a red circle on a gray background") == {
        "object:green square",
        "color:green square",
    }
    assert failed("a blue square above a red star on a gray background") == {
        "object:red star",
        "shape:red star",
    }
    single = parse_caption("a small green ring on a black background")
    small = render(single, generator)
    assert failed("a large green ring on a black background", small) == {"size"}
    three = parse_caption("three yellow stars on a brown background")
    stars = render(three, generator)
    assert failed("four yellow stars on a brown background", stars) == {"counting"}


def test_a_further_object_fails_counting_and_a_speck_does_not():
    scene = parse_caption("a small green circle on a white background")
    image = render(scene, np.random.default_rng(10))
    speck, extra = image.copy(), image.copy()
    speck[4:6, 4:7] = (225, 35, 35)
    extra[4:10, 4:10] = (225, 35, 35)
    assert referee.strict(referee.judge(speck, scene))
    assert referee.judge(extra, scene)["counting"] is False


def test_a_shapeless_or_two_colored_object_is_not_accepted():
    scene = parse_caption("a large red circle on a white background")
    image = render(scene, np.random.default_rng(11))
    y, x = np.mgrid[:64, :64] - 31.5
    diamond = np.where((np.abs(x) + np.abs(y) < 26)[..., None], (225, 35, 35), 245)
    assert not any(
        passed
        for key, passed in referee.judge(diamond.astype(np.uint8), scene).items()
        if key.startswith(("shape", "object"))
    )
    two = image.copy()
    left = (image.astype(int)[:, :, 1] < 150) & (np.arange(64)[None, :] < 32)
    two[left] = (40, 70, 225)
    assert referee.judge(two, scene)["color:red circle"] is False


def test_nothing_at_all_fails_and_wrong_arrays_are_refused():
    empty = np.full((64, 64, 3), 128, np.uint8)
    for scene in sample_scenes(np.random.default_rng(12), 20, "all"):
        checks = referee.judge(empty, scene)
        assert {key for key, passed in checks.items() if passed} <= {"background"}
        noise = np.random.default_rng(13).integers(0, 256, (64, 64, 3), np.uint8)
        assert not referee.strict(referee.judge(noise, scene))
    with pytest.raises(ValueError, match="expected a uint8 image"):
        referee.judge(np.zeros((32, 32, 3), np.uint8), scene)
