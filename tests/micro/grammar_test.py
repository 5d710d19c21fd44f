"""Captions: worded as documented, read back as their scenes, refused outside of the grammar."""

import pytest

from agfsync_jax.micro.grammar import (
    KINDS,
    parse_caption,
)
from agfsync_jax.micro.scenes import (
    all_scenes,
)

EVERY_SCENE = [scene for kind in KINDS for scene in all_scenes(kind)]


def test_every_caption_reads_back_as_its_scene():
    captions = [scene.caption() for scene in EVERY_SCENE]
    assert len(set(captions)) == len(set(EVERY_SCENE)) == 288 + 14400 + 432
    assert [parse_caption(caption) for caption in captions] == EVERY_SCENE


def test_captions_are_worded_as_documented():
    captions = {scene.caption() for scene in EVERY_SCENE}
    assert "a large red circle on a brown background" in captions
    assert "a blue square above a red circle on a gray background" in captions
    assert "a green star to the left of a purple ring on a white background" in captions
    assert "three red crosses on a black background" in captions


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a photo of a cat", "grammar"),
        ("a large red circle", "grammar"),
        ("a huge red circle on a brown background", "'huge' is not a size"),
        ("a large pink circle on a brown background", "'pink' is not a color"),
        ("a large red blob on a brown background", "'blob' is not a shape"),
        ("a large red circle on a pink background", "'pink' is not a background"),
        ("five red crosses on a black background", "'five' is not a count"),
        ("three red cross on a black background", "'cross' is not a plural shape"),
        ("a red circle above a red star on a gray background", "differ in color and in shape"),
    ],
)
def test_captions_outside_the_grammar_are_refused(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_caption(caption)
