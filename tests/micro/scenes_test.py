"""Which scenes there are: splits, the mix of kinds, what is nearly the same."""

import collections

import numpy as np
import pytest

from agfsync_jax.micro.grammar import (
    KINDS,
    Scene,
    in_reading_order,
    parse_caption,
)
from agfsync_jax.micro.scenes import (
    all_scenes,
    is_heldout,
    misread,
    mutate,
    sample_scene,
    sample_scenes,
)


def test_a_fifth_is_held_out_and_the_splits_are_disjoint():
    scenes = [scene for kind in KINDS for scene in all_scenes(kind)]
    heldout = {scene.caption() for scene in scenes if is_heldout(scene)}
    assert 0.18 < len(heldout) / len(scenes) < 0.22
    train = {s.caption() for s in sample_scenes(np.random.default_rng(0), 1500, "train")}
    test = {s.caption() for s in sample_scenes(np.random.default_rng(0), 1500, "heldout")}
    assert not train & heldout
    assert test <= heldout
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        sample_scene(np.random.default_rng(0), "dev")


def test_a_pair_told_from_its_other_object_shares_the_split():
    told = "a blue square above a red circle on a gray background"
    mirrored = "a red circle below a blue square on a gray background"
    assert is_heldout(parse_caption(told)) == is_heldout(parse_caption(mirrored))
    mirrors = {"above": "below", "to the left of": "to the right of"}
    for scene in all_scenes("pair"):
        if scene.relation in mirrors:
            mirror = Scene(
                "pair", scene.objects[::-1], scene.background, None, mirrors[scene.relation], 2
            )
            assert is_heldout(scene) == is_heldout(mirror)


def test_unique_scenes_keep_the_mix_while_a_kind_lasts():
    scenes = sample_scenes(np.random.default_rng(0), 150, "heldout", unique=True)
    assert len({scene.caption() for scene in scenes}) == 150
    kinds = collections.Counter(scene.kind for scene in scenes)
    assert 20 < kinds["single"] < 55 and 55 < kinds["pair"] < 95 and 20 < kinds["count"] < 55
    # All of the held-out split: the small kinds run out and pairs fill up.
    total = sum(len(all_scenes(kind, "heldout")) for kind in KINDS)
    scenes = sample_scenes(np.random.default_rng(0), total, "heldout", unique=True)
    assert len(set(scenes)) == total
    with pytest.raises(ValueError, match=f"has only {total}"):
        sample_scenes(np.random.default_rng(0), total + 1, "heldout", unique=True)


def test_a_mutant_differs_in_one_attribute_or_in_the_order():
    generator, orders = np.random.default_rng(0), 0
    for scene in sample_scenes(generator, 500, "all"):
        mutant = mutate(scene, generator)
        assert parse_caption(mutant.caption()) == mutant
        differences = [
            getattr(scene, field) != getattr(mutant, field)
            for field in ("kind", "background", "size", "relation", "count")
        ]
        if mutant.objects == scene.objects[::-1] != scene.objects:
            assert sum(differences) == 0
            orders += 1
            continue
        for mine, theirs in zip(scene.objects, mutant.objects, strict=True):
            differences += [mine.color != theirs.color, mine.shape != theirs.shape]
        assert sum(differences) == 1
        assert not is_heldout(mutate(scene, generator, "train"))
    assert orders > 20


def test_a_careless_caption_names_everything_and_tells_another_picture():
    generator, changes = np.random.default_rng(0), set()
    for scene in sample_scenes(generator, 400, "train"):
        told = misread(scene, generator, "train")
        assert not is_heldout(told)
        if told == scene:
            continue
        assert in_reading_order(told) != in_reading_order(scene)
        assert told.background == scene.background
        for attribute in ("color", "shape"):
            assert {getattr(thing, attribute) for thing in told.objects} == {
                getattr(thing, attribute) for thing in scene.objects
            }
        changes.add((scene.kind, told.objects == scene.objects[::-1], told.count - scene.count))
    assert changes == {
        ("single", True, 0), ("pair", True, 0), ("pair", False, 0),
        ("count", True, 1), ("count", True, -1),
    }  # fmt: skip
