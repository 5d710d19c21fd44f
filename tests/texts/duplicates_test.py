"""Near duplicates are those of the plain definition, in blocks of any size."""

import numpy as np
import pytest

from agfsync_jax.texts.duplicates import near_duplicates

THRESHOLD = 0.9


def clustered(count, width, seed=0):
    """Rows of length one around a tenth as many centers, cosines with these 0.7 to 1; copies."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    centers = unit(rng.standard_normal((count // 10, width)))[rng.integers(0, count // 10, count)]
    aside = rng.standard_normal((count, width))
    aside = unit(aside - np.sum(aside * centers, axis=1, keepdims=True) * centers)
    cosine = rng.uniform(0.7, 1, (count, 1))
    rows = (cosine * centers + np.sqrt(1 - cosine**2) * aside).astype(np.float32)
    copies = rng.choice(count, (2, count // 50), replace=False)
    rows[copies[0]] = rows[copies[1]]
    return rows


def definition(rows, known):
    """The docstring's, in float64, and all n x n cosines."""
    cosines = rows.astype(np.float64) @ rows.astype(np.float64).T
    kept, nearest = [], np.full(len(rows), -1)
    for i in range(len(rows)):
        if i >= known and kept:
            j = kept[int(np.argmax(cosines[i, kept]))]
            if cosines[i, j] >= THRESHOLD:
                nearest[i] = j
                continue
        kept.append(i)
    return nearest, cosines


@pytest.mark.parametrize("known, blocks", [(0, (1000, 777)), (1234, (1000, 5000))])
def test_equals_the_definition(known, blocks):
    rows = clustered(5000, 16)
    rows[[70, 900]] = rows[[3, 3]]  # known ones, too, may be equal
    expected, cosines = definition(rows, known)
    is_dropped = expected >= 0
    # a row near to a dropped one, and to none that is kept
    before = np.tril(cosines >= THRESHOLD, -1)
    before[:known] = False
    chained = ~is_dropped & before[:, is_dropped].any(axis=1)
    assert chained.sum() > 20 and is_dropped.mean() > 0.1
    assert np.abs(cosines - THRESHOLD).min() > 2e-7  # float32 is enough to tell
    for block in blocks:
        np.testing.assert_array_equal(near_duplicates(rows, known=known, block=block), expected)


def test_known_rows_are_kept_and_the_first_of_equal_ones_is_told():
    east, north = np.eye(2)
    rows = np.stack([north, east, east, east, north, east])
    for block in (1, 2, 4096):
        assert near_duplicates(rows, known=3, block=block).tolist() == [-1, -1, -1, 1, 0, 1]
    assert near_duplicates(rows).tolist() == [-1, -1, 1, 1, 0, 1]
    assert near_duplicates(rows, known=6).tolist() == [-1] * 6
    assert near_duplicates(rows[:0]).tolist() == []


def test_the_threshold_is_of_the_cosine():
    rows = np.array([[1, 0], [0.6, 0.8], [0.8, -0.6]])
    assert near_duplicates(rows, 0.61).tolist() == [-1, -1, 0]
    assert near_duplicates(rows, 0.59).tolist() == [-1, 0, 0]
    assert near_duplicates(rows, 0.81).tolist() == [-1, -1, -1]


def test_of_equal_cosines_the_first_is_told():
    """In whichever block it is."""
    rows = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0.5**0.5, 0.5**0.5, 0]])
    for block in (1, 2, 3, 4):
        assert near_duplicates(rows, 0.7, block=block).tolist() == [-1, -1, -1, 0]


def test_rows_that_are_far_from_all():
    """Their largest cosine is below zero, in blocks that are not full."""
    rows = np.array([[1, 0], [1, 0], [-0.6, 0.8], [-0.6, -0.8], [-0.6, -0.8]])
    for block in (2, 3):
        assert near_duplicates(rows, block=block).tolist() == [-1, 0, -1, -1, 3]


def test_progress_counts_every_row_once():
    done = []
    near_duplicates(clustered(50, 16), known=8, block=20, on_progress=done.append)
    assert done == [8, 20, 20, 2]


def test_errors():
    rows = np.eye(3)
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"known": 4}, {"block": 0}):
        with pytest.raises(ValueError, match="at most the 3 rows that there are"):
            near_duplicates(rows, **wrong)
    for value in (2.0, np.nan):
        rows[1, 1] = value
        with pytest.raises(ValueError, match="row 1 is not of length one"):
            near_duplicates(rows)
