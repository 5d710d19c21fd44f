"""A shard's tables: what a repair leaves of them."""

import numpy as np
import pytest

from agfsync_jax.data import records, scores
from agfsync_jax.data.images import encode_png
from agfsync_jax.data.problems import problem


@pytest.fixture
def shard(tmp_path):
    """Images and their three tables, whole."""
    images = tmp_path / "candidates" / "00000-of-00001.tfrecord"
    row = {"prompt_id": "p", "candidate": 0, "seed": 0, "latents": np.zeros((1, 1, 1), np.float16)}
    row["image"] = encode_png(np.zeros((2, 2, 3), np.uint8))
    records.write_shard(images, [row], records.CANDIDATE_FEATURES)
    path = scores.scores_path(images)
    assert path == tmp_path / "scores" / "00000-of-00001.parquet"
    found = [problem("unanswered", "prompt p, candidate 0", "vqa on 'what?'")]
    scores.write_scores(path, [{"prompt_id": "p", "candidate": 0, "clip": 1.0}], [{"a": 1}], found)
    return images, path


def there(shard):
    images, path = shard
    paths = images, path, scores.answers_path(path), scores.problems_path(path)
    return [each.exists() for each in paths]


def damage(path):
    path.write_bytes(path.read_bytes()[:-9])


def test_whole_tables_stay(shard):
    scores.problems_path(shard[1]).unlink()
    assert not scores.repair_scores(*shard, 1) and there(shard) == [True, True, True, False]


def test_what_was_left_out_is_tried_again(shard):
    assert not scores.repair_scores(*shard, 1) and there(shard) == [True, False, True, False]


def test_images_that_cannot_be_decoded_go(shard):
    records.write_jsonl(scores.problems_path(shard[1]), [problem("undecodable", "p", "no PNG")])
    assert scores.repair_scores(*shard, 1) and there(shard) == [False, False, True, False]


def test_scores_go_with_their_answers(shard):
    scores.problems_path(shard[1]).unlink()
    damage(scores.answers_path(shard[1]))
    assert not scores.repair_scores(*shard, 1) and there(shard) == [True, False, False, False]


def test_damaged_images_and_scores_go(shard):
    scores.problems_path(shard[1]).unlink()
    for path in shard:
        damage(path)
    assert scores.repair_scores(*shard, 1) and there(shard) == [False, False, True, False]


def test_images_cut_between_two_go(shard):
    """Well-formed, but there should be two."""
    assert scores.repair_scores(*shard, 2) and there(shard) == [False, False, True, False]


def test_damaged_problems_take_the_scores_with_them(shard):
    """What was left out is not known then."""
    damage(scores.problems_path(shard[1]))
    assert not scores.repair_scores(*shard, 1) and there(shard) == [True, False, True, False]


def test_the_images_of_a_shard_are_counted(shard):
    """Those with scores, and those without."""
    assert scores.num_images(shard[1]) == 1
    found = [problem("damaged", "shard 0", "cut", 3), problem("undecodable", "p", "no PNG")]
    found.append(problem("nonfinite", "p", "clip is nan"))
    records.write_jsonl(scores.problems_path(shard[1]), found)
    assert scores.num_images(shard[1]) == 5
