"""What is left out is counted as it comes, and too much of it stops."""

import pytest

from agfsync_jax.data.problems import Problems, problem


def test_counts_names_and_the_limit():
    problems = Problems({"images": 100, "scores": 100}, 0.1, "config.a.b")
    problems.add([problem("undecodable", f"image {n}", "no PNG") for n in range(6)])
    problems.add(iter([problem("nonfinite", "image 9", "clip is nan")]))
    problems.add([problem("damaged", "shard 3", "cut off", 4)])
    assert problems.counts() == {"damaged": 4, "undecodable": 6, "nonfinite": 1}
    told = problems.told()
    assert told[0] == "left out: 4 of 100 images in damaged shards"
    assert told[3:8] == [f"image {n}: no PNG" for n in range(5)] and told[8] == "and 1 more"
    with pytest.raises(ValueError, match=r"11 of 100 images that.* 11.0%, more than config.a"):
        problems.add([problem("undecodable", "shard 4", "no PNG", 5)])
    with pytest.raises(ValueError, match="config.a.b=2: expected a share"):
        Problems({}, 2, "config.a.b")


def test_each_one_is_counted_once():
    """Not all over again whenever there are more: there may be as many as shards."""
    read = []

    class Row(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    problems = Problems({"images": 10**6}, 1.0, "config.a.b")
    for shard in range(100):
        problems.add([Row(problem("damaged", f"shard {shard}", "cut off"))])
    assert problems.counts() == {"damaged": 100}
    assert read.count("count") == 100
