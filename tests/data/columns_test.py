from agfsync_jax.data.columns import without_parts


def test_parts_of_a_column_are_left_out():
    names = ["vqa/accuracy", "referee/color", "clip", "referee", "vqa/number", "referee/size"]
    assert without_parts(names) == ["vqa/accuracy", "clip", "referee", "vqa/number"]
    assert without_parts(iter(["a/b"])) == ["a/b"]  # of nothing that is there
