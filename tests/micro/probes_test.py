"""Probes: what facts a scene has, and that a layer learns to read them."""

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.micro import probes
from agfsync_jax.micro.grammar import in_reading_order, parse_caption
from agfsync_jax.micro.scenes import sample_scenes


def value(slots, name, values):
    return values[[fact for _, fact in slots].index(name)]


def test_a_caption_and_its_other_telling_say_the_same():
    told = parse_caption("a red circle below a blue star on a gray background")
    other = parse_caption("a blue star above a red circle on a gray background")
    wrong = parse_caption("a red circle above a blue star on a gray background")
    assert probes.of_caption(told) == probes.of_caption(other) != probes.of_caption(wrong)
    assert probes.of_picture(told) == probes.of_picture(other) != probes.of_picture(wrong)


def test_each_scene_of_the_world_has_values_of_its_own():
    rng = np.random.default_rng(0)
    scenes = sample_scenes(rng, 400, "all", unique=True)
    pictures = {in_reading_order(scene) for scene in scenes}
    for slots, of in (
        (probes.IN_CAPTION, probes.of_caption),
        (probes.IN_QUERIES, probes.of_picture),
    ):
        rows = [of(scene) for scene in pictures]
        assert len({tuple(row) for row in rows}) == len(pictures)
        assert (np.array(rows) < np.array(list(slots.values()))).all()
        assert len(rows[0]) == len(slots)


def test_a_malformed_object_is_named_so():
    scene = parse_caption("a red circle below a blue star on a gray background")
    plain, bent = probes.of_picture(scene), probes.of_picture(scene, scene.objects[:1])
    assert value(probes.IN_QUERIES, "red shape", plain) != value(
        probes.IN_QUERIES, "red shape", bent
    )
    assert np.sum(np.array(plain) != bent) == 1


def test_the_loss_is_the_mean_cross_entropy_of_the_named_tokens():
    slots = {(0, "one"): 2, (-1, "two"): 3}
    tokens = jax.random.normal(jax.random.key(0), (5, 4, 8))
    layers = probes.init(slots, 8)
    targets = jnp.array([[0, 1], [1, 2], [0, 0], [1, 1], [1, 0]])
    flat = probes.loss(slots, layers, tokens, targets)
    assert np.isclose(flat, (np.log(2) + np.log(3)) / 2)
    layers["two"]["kernel"] = jax.random.normal(jax.random.key(1), (8, 3))
    logits = np.asarray(tokens[:, -1] @ layers["two"]["kernel"])
    chosen = np.take_along_axis(logits, np.asarray(targets[:, 1:]), 1)[:, 0]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    assert np.isclose(
        probes.loss(slots, layers, tokens, targets), (np.log(2) + expected) / 2, atol=1e-5
    )
