"""The maths of pairing: normalizing, combining, selecting, and what is dropped and counted."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from agfsync_jax.data import preferences
from agfsync_jax.data.preferences import Choice, choose, combine, normalize, same, select

RNG = np.random.default_rng(0)
# Values as scorers make them: plain, with ties, negative, tiny spread, huge, all equal, two only.
COLUMNS = [
    RNG.normal(size=8),
    RNG.integers(0, 3, 8) / 4,
    -RNG.random(5) - 3,
    25 + 0.1 * RNG.random(6),
    1e8 * RNG.random(4),
    np.zeros(5),
    np.full(3, 0.1),
    np.array([0.25, 0.75]),
]


@pytest.mark.parametrize("method", preferences.NORMALIZATIONS)
@pytest.mark.parametrize("x", COLUMNS, ids=range(len(COLUMNS)))
def test_normalize_keeps_the_order_and_the_ties(x, method):
    y = normalize(x, method)
    assert y.shape == x.shape and np.isfinite(y).all()
    for i, j in itertools.product(range(len(x)), repeat=2):
        assert np.sign(x[i] - x[j]) == np.sign(y[i] - y[j])


@pytest.mark.parametrize("method", ["zscore", "rank", "minmax"])
@pytest.mark.parametrize("x", COLUMNS[:5], ids=range(5))
def test_normalize_does_not_see_scale_and_offset(x, method):
    np.testing.assert_allclose(normalize(3 * x + 7, method), normalize(x, method), atol=1e-6)
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(normalize(x[order], method), normalize(x, method)[order], atol=1e-9)


def test_normalize_values():
    x = np.array([1.0, 3.0, 3.0, 5.0])
    np.testing.assert_allclose(normalize(x, "none"), x)
    np.testing.assert_allclose(normalize(x, "zscore"), (x - 3) / np.sqrt(2))
    np.testing.assert_allclose(normalize(x, "rank"), [0, 0.5, 0.5, 1])
    np.testing.assert_allclose(normalize([1, 1 + 1e-9, 5], "rank"), [0.25, 0.25, 1])
    np.testing.assert_allclose(normalize(x, "minmax"), [0, 0.5, 0.5, 1])
    for value in COLUMNS[:5]:
        z = normalize(value, "zscore")
        np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-6)
        assert normalize(value, "minmax").min() == 0 and normalize(value, "minmax").max() == 1


@pytest.mark.parametrize("method", ["zscore", "rank", "minmax"])
def test_normalize_of_equal_values_is_zero(method):
    for x in ([2.0], [0.1] * 7, [0.0, 0.0], [0.3, np.float32(0.3)], [-1e9] * 3):
        np.testing.assert_array_equal(normalize(x, method), 0)


def test_combine():
    columns = {"a": np.array([0.0, 1.0, 2.0]), "b": np.array([9.0, 5.0, 1.0]), "c": np.ones(3)}
    np.testing.assert_allclose(combine(columns, {"a": 2.0, "b": 0.5}, "none"), [4.5, 4.5, 4.5])
    np.testing.assert_allclose(combine(columns, {"a": 1.0, "b": 1.0}, "minmax"), [1, 1, 1])
    np.testing.assert_allclose(combine(columns, {"a": 1.0, "c": 5.0}, "rank"), [0, 0.5, 1])
    np.testing.assert_allclose(combine(columns, {"b": -1.0}, "none"), [-9, -5, -1])


def test_same_needs_every_column():
    columns = {"a": np.array([1.0, 1.0, 2.0]), "b": np.array([0.5, 0.5 + 1e-9, 0.5])}
    expected = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    np.testing.assert_array_equal(same(columns, {"a": 1.0, "b": 1.0}), expected)
    assert same(columns, {"b": 1.0}).all()


def pick(scores, strategy="best_worst", tied=None, **limits):
    tied = np.eye(len(scores), dtype=bool) if tied is None else tied
    return select(scores, tied, strategy=strategy, **limits)


def test_best_worst():
    assert pick([0.2, 0.9, 0.1, 0.5]) == ([(1, 2)], {})
    assert pick([0.9, 0.9, 0.1, 0.1]) == ([(0, 2)], {})
    assert pick([0.4, 0.4, 0.4]) == ([], {"ties": 1})
    assert pick([0.4, 0.6], min_margin=0.3) == ([], {"margin": 1})
    assert pick([0.25, 0.75], min_margin=0.5) == ([(1, 0)], {})
    assert pick([1.0, 2.0], tied=np.ones((2, 2), bool)) == ([], {"ties": 1})


def test_all_above_margin():
    scores = [0.0, 1.0, 3.0, 3.0]
    pairs, dropped = pick(scores, "all_above_margin")
    assert pairs == [(2, 0), (3, 0), (2, 1), (3, 1), (1, 0)] and dropped == {"ties": 1}
    pairs, dropped = pick(scores, "all_above_margin", min_margin=2.0)
    assert pairs == [(2, 0), (3, 0), (2, 1), (3, 1)] and dropped == {"ties": 1, "margin": 1}
    pairs, dropped = pick(scores, "all_above_margin", min_margin=2.0, max_pairs=3)
    assert pairs == [(2, 0), (3, 0), (2, 1)]
    assert dropped == {"ties": 1, "margin": 1, "limit": 1}


@pytest.mark.parametrize("seed", range(20))
def test_select_accounts_for_every_pair(seed):
    rng = np.random.default_rng(seed)
    n, margin, limit = int(rng.integers(2, 9)), 0.2 * rng.random(), int(rng.integers(0, 6))
    scores = rng.integers(0, 5, n) / 4
    everything, dropped = pick(scores, "all_above_margin", min_margin=margin, max_pairs=limit)
    assert len(everything) + sum(dropped.values()) == n * (n - 1) // 2
    assert len(set(everything)) == len(everything) and (not limit or len(everything) <= limit)
    margins = [scores[i] - scores[j] for i, j in everything]
    assert all(m >= margin and m > 0 for m in margins)
    assert margins == sorted(margins, reverse=True)
    best, dropped = pick(scores, min_margin=margin)
    assert len(best) + sum(dropped.values()) == 1
    assert not best or scores[best[0][0]] - scores[best[0][1]] == np.ptp(scores)
    assert bool(best) == bool(everything)


def settings(**changes):
    base = {
        "weights": {"vqa": 1.0, "clip": 0.1},
        "normalize": "zscore",
        "min_margin": 0.0,
        "strategy": "best_worst",
        "max_pairs": 0,
    }
    return ConfigDict(base | changes)


def rows(prompt_id, vqa, clip=None):
    clip = [20.0] * len(vqa) if clip is None else clip
    return [
        {"prompt_id": prompt_id, "candidate": n, "vqa": v, "clip": c}
        for n, (v, c) in enumerate(zip(vqa, clip, strict=True))
    ]


def test_choose_counts_what_it_drops():
    nan, inf = float("nan"), float("inf")
    scores = {
        "00000-of-00002": rows("good", [0.2, 0.8, nan]) + rows("tie", [0.5, 0.5, 0.5]),
        "00001-of-00002": rows("few", [0.5, nan]) + rows("none", [inf, nan]),
    }
    prompts = dict.fromkeys(["good", "tie", "few", "none", "never drawn"], "text")
    choices, counts = choose(scores, prompts, settings())
    assert [choice[:4] for choice in choices] == [("00000-of-00002", "good", 1, 0)]
    np.testing.assert_allclose(choices[0][4:], [1.0, -1.0])
    assert counts == {
        "pairs": 1,
        "prompts": 5,
        "ties": 1,
        "margin": 0,
        "limit": 0,
        "nonfinite": 4,
        "too_few": 3,
    }


def test_a_column_without_weight_may_hold_anything():
    scores = {"s": rows("p", [0.2, 0.8], clip=[float("nan"), None])}
    changed = settings(weights={"vqa": 1.0, "clip": 0.0})
    assert len(choose(scores, {"p": ""}, changed)[0]) == 1
    assert choose(scores, {"p": ""}, settings())[1]["nonfinite"] == 2


def test_the_second_column_breaks_ties_of_the_first():
    scores = {"s": rows("p", [1.0, 1.0, 1.0], clip=[20.0, 22.0, 21.0])}
    (choice,), _ = choose(scores, {"p": ""}, settings())
    assert (choice.chosen, choice.rejected) == (1, 0)


def test_min_margin_is_one_of_the_combined_score():
    scores = {"s": rows("p", [0.0, 0.5, 1.0])}
    spread = 2 * np.sqrt(1.5)
    for margin, kept in ((spread - 1e-9, 1), (spread + 1e-9, 0)):
        assert choose(scores, {"p": ""}, settings(min_margin=margin))[1]["pairs"] == kept


@pytest.mark.parametrize("method", preferences.NORMALIZATIONS)
@pytest.mark.parametrize("strategy", preferences.STRATEGIES)
def test_rounding_makes_no_preference(method, strategy):
    vqa = np.float32(0.7) + np.array([0, 1, 2, 0], np.float32) * np.float32(6e-8)
    scores = {"s": rows("p", vqa.tolist(), clip=[23.1] * 4)}
    choices, counts = choose(scores, {"p": ""}, settings(normalize=method, strategy=strategy))
    assert not choices and counts["ties"] == (1 if strategy == "best_worst" else 6)


def test_choose_refuses():
    with pytest.raises(ValueError, match="no column 'vqa'.* they have prompt_id, candidate, clip"):
        choose({"s": [{"prompt_id": "p", "candidate": 0, "clip": 1.0}]}, {"p": ""}, settings())
    with pytest.raises(ValueError, match="prompt 'q' is not listed"):
        choose({"s": rows("q", [0.1, 0.2])}, {"p": ""}, settings())
    with pytest.raises(ValueError, match="shard t: prompt 'p' is in s too"):
        choose({"s": rows("p", [0.1]), "t": rows("p", [0.2])}, {"p": ""}, settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": "softmax"}, r"normalize='softmax': expected none \| zscore"),
        ({"strategy": "best"}, r"strategy='best': expected best_worst"),
        ({"weights": {}}, "one at least not 0"),
        ({"weights": {"vqa": 0.0}}, "one at least not 0"),
        ({"weights": {"vqa": float("nan")}}, "expected numbers"),
        ({"min_margin": -0.1}, "min_margin=-0.1: expected 0 or more"),
        ({"min_margin": float("nan")}, "min_margin=nan"),
        ({"max_pairs": -1}, "max_pairs=-1"),
    ],
)
def test_check_settings(changes, message):
    preferences.check_settings(settings())
    with pytest.raises(ValueError, match=message):
        preferences.check_settings(settings(**changes))


def test_shuffle_labels_swaps_half_and_depends_on_the_pair_alone():
    choices = [Choice("s", f"p{n}", n % 3, 3 + n % 2, 1.0, 0.0) for n in range(400)]
    shuffled = preferences.shuffle_labels(choices, 0, 0)
    swapped = [a.chosen != b.chosen for a, b in zip(choices, shuffled, strict=True)]
    assert 150 < sum(swapped) < 250
    for before, after in zip(choices, shuffled, strict=True):
        assert after.pair_id == before.pair_id
        assert {after.chosen, after.rejected} == {before.chosen, before.rejected}
        assert (after.chosen_score == 1.0) == (after.chosen == before.chosen)
    assert preferences.shuffle_labels(choices[7:], 0, 0) == shuffled[7:]
    assert preferences.shuffle_labels(choices, 1, 0) != shuffled
    assert preferences.shuffle_labels(choices, 0, 1) != shuffled
