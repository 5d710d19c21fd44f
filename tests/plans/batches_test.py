"""The largest batch that fits is found in few compilations."""

import pytest

from agfsync_jax.plans._batches import search


@pytest.mark.parametrize("known, largest", [(1, 21), (8, 21), (40, 21)])
def test_the_largest_batch_is_found_in_few_compilations(known, largest):
    tried = []

    def peak(size):  # bytes; like a compiler's, which has an odd share for itself
        return 300 + 32 * size + size % 3

    def compiled(size):
        tried.append(size)
        return peak(size) if size < 100 else None  # where it says nothing

    found = search(compiled, {known: peak(known)}, 1000)
    assert largest - largest // 8 <= found <= largest and peak(found) <= 1000
    assert len(tried) == len(set(tried)) <= 4
    assert search(compiled, {1: peak(1)}, 301) == 0
    assert search(compiled, {4: peak(4)}, 1000, unit=4) == 20


def test_the_largest_batch_is_found_where_the_compiler_saves():
    """As it was seen to do near the end; a size later it has no way."""
    tried = []

    def peak(size):
        tried.append(size)
        return min(700 + 50 * size, 1500 + size) if size < 28 else None

    assert 25 <= search(peak, {4: 900}, 1575) <= 27
    assert len(tried) == len(set(tried)) <= 9
