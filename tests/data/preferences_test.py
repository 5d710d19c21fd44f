"""The maths of pairing: normalizing, combining, selecting, and what is dropped and counted."""

import itertools

import numpy as np
import pytest

from agfsync_jax.data import preferences
from agfsync_jax.data.preferences import Choice, Scored, choose, combine, normalize, same, select
from configs import common

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


def test_top_k_bottom_k():
    scores = [0.0, 5.0, 1.0, 4.0, 2.0]
    pairs, dropped = pick(scores, "top_k_bottom_k", k=2)
    assert pairs == [(1, 0), (1, 2), (3, 0), (3, 2)] and not dropped
    assert pick(scores, "top_k_bottom_k", k=1) == pick(scores)
    # cut to half of them: the one in the middle is on no side
    assert pick(scores, "top_k_bottom_k", k=9) == (pairs, {})
    limits = {"k": 2, "min_margin": 4.0, "max_pairs": 1}
    pairs, dropped = pick(scores, "top_k_bottom_k", **limits)
    assert pairs == [(1, 0)] and dropped == {"limit": 2, "margin": 1}
    assert pick([1.0, 1.0, 1.0, 0.0], "top_k_bottom_k", k=2)[1] == {"ties": 2}


def test_ranked():
    assert pick([0.2, 0.9, 0.1, 0.9], "ranked") == ([(1, 3, 0, 2)], {})
    assert pick([0.2, 0.9, 0.1], "ranked", min_margin=0.8, max_pairs=1) == ([(1, 0, 2)], {})
    assert pick([0.2, 0.9, 0.15], "ranked", min_margin=0.8) == ([], {"margin": 1})
    assert pick([0.4, 0.4, 0.4], "ranked") == ([], {"ties": 1})


def looked_at(scores, strategy, k):
    """The pairs that a strategy chooses from, by its definition."""
    n = len(scores)
    down = sorted(range(n), key=lambda i: (-scores[i], i))
    if strategy == "all_above_margin":
        return set(itertools.combinations(down, 2))
    k = 1 if strategy == "best_worst" else min(k, n // 2)
    up = [i for i in sorted(range(n), key=lambda i: (scores[i], i)) if i not in down[:k]]
    return set(itertools.product(down[:k], up[:k]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("strategy", preferences.STRATEGIES[:3])
def test_select_accounts_for_every_pair(strategy, seed):
    rng = np.random.default_rng(seed)
    n, margin, limit = int(rng.integers(2, 9)), 0.2 * rng.random(), int(rng.integers(0, 6))
    scores, k = rng.integers(0, 5, n) / 4, int(rng.integers(1, 5))
    kept, dropped = pick(scores, strategy, k=k, min_margin=margin, max_pairs=limit)
    margins = {(i, j): scores[i] - scores[j] for i, j in looked_at(scores, strategy, k)}
    enough = [pair for pair in margins if margins[pair] > 0 and margins[pair] >= margin]
    assert dropped["ties"] == sum(m == 0 for m in margins.values())
    assert dropped["margin"] == sum(0 < m < margin for m in margins.values())
    assert len(kept) + dropped["limit"] == len(enough) and set(kept) <= set(enough)
    assert len(kept) == (min(limit, len(enough)) if limit else len(enough))
    found = [margins[pair] for pair in kept]
    assert found == sorted((margins[pair] for pair in enough), reverse=True)[: len(kept)]


def settings(**changes):
    spec = common.get_config().pair
    spec.weights = {"vqa": 1.0, "clip": 0.1}
    spec.update(changes)
    if "weights" in changes:
        spec.weights = changes["weights"]
    return spec


def rows(prompt_id, vqa, clip=None, **others):
    columns = {"vqa": vqa, "clip": [20.0] * len(vqa) if clip is None else clip}
    columns = {name: np.array(values, np.float64) for name, values in columns.items()}
    return Scored([prompt_id] * len(vqa), list(range(len(vqa))), columns, **others)


def joined(*parts):
    """Several prompts' scores as one shard."""
    return Scored(
        [i for part in parts for i in part.prompt_ids],
        [c for part in parts for c in part.candidates],
        {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns},
        frozenset().union(*(part.unanswered for part in parts)),
        {key: count for part in parts for key, count in part.num_questions.items()},
    )


def test_choose_counts_what_it_drops():
    nan, inf = float("nan"), float("inf")
    scores = {
        "00000-of-00002": joined(rows("good", [0.2, 0.8, nan]), rows("tie", [0.5, 0.5, 0.5])),
        "00001-of-00002": joined(rows("few", [0.5, nan]), rows("none", [inf, nan])),
    }
    prompts = dict.fromkeys(["good", "tie", "few", "none", "never drawn"], "text")
    choices, counts = choose(scores, prompts, settings())
    assert [choice[:3] for choice in choices] == [("00000-of-00002", "good", (1, 0))]
    np.testing.assert_allclose(choices[0].scores, [1.0, -1.0])
    expected = {"pairs": 1, "prompts": 5, "ties": 1, "nonfinite": 4, "too_few": 3}
    assert counts == dict.fromkeys(preferences.COUNTS, 0) | expected


def test_questions_without_an_answer():
    """Each candidate and each prompt is dropped for one reason."""
    nan = float("nan")
    unanswered = frozenset({("p", 1), ("p", 3), ("q", 0)})
    scored = joined(
        rows("p", [0.1, 0.9, 0.7, nan, nan], unanswered=unanswered, num_questions={"p": 5}),
        rows("q", [0.1, 0.9], num_questions={"q": 6}),
        rows("few", [nan, 0.9], num_questions={"few": 4}),
        rows("unasked", [0.1, 0.9]),
    )
    prompts = dict.fromkeys(["p", "q", "few", "unasked"], "text")
    choices, counts = choose({"s": scored}, prompts, settings(min_questions=5))
    assert [choice.candidates for choice in choices] == [(2, 0)]
    found = {name: number for name, number in counts.items() if number}
    assert found == dict(pairs=1, prompts=4, few_questions=2, too_few=1, unanswered=3, nonfinite=1)
    choices, counts = choose({"s": scored}, prompts, settings())
    assert [c.pair_id for c in choices] == ["p-0-2", "unasked-0-1"] and not counts["few_questions"]
    assert counts["nonfinite"] == 2 and counts["too_few"] == 2


@pytest.mark.parametrize("method", preferences.NORMALIZATIONS)
def test_ranked_is_the_order_of_the_weighted_sum(method):
    vqa, clip = RNG.random(6), 20 + RNG.random(6)
    columns = {"vqa": vqa, "clip": clip}
    (choice,), counts = choose(
        {"s": rows("p", vqa, clip=clip)}, {"p": ""}, settings(strategy="ranked", normalize=method)
    )
    total = normalize(columns["vqa"], method) + 0.1 * normalize(columns["clip"], method)
    order = np.argsort(-total)
    assert choice.candidates == tuple(order) and counts["pairs"] == 1
    np.testing.assert_allclose(choice.scores, total[order], rtol=1e-12)
    assert choice.margin == choice.scores[0] - choice.scores[-1]
    assert choice.pair_id == "p-0-1-2-3-4-5"


def test_a_column_without_weight_may_hold_anything():
    scores = {"s": rows("p", [0.2, 0.8], clip=[float("nan")] * 2)}
    changed = settings(weights={"vqa": 1.0, "clip": 0.0})
    assert len(choose(scores, {"p": ""}, changed)[0]) == 1
    assert choose(scores, {"p": ""}, settings())[1]["nonfinite"] == 2


def test_the_second_column_breaks_ties_of_the_first():
    scores = {"s": rows("p", [1.0, 1.0, 1.0], clip=[20.0, 22.0, 21.0])}
    (choice,), _ = choose(scores, {"p": ""}, settings())
    assert choice.candidates == (1, 0)


def test_min_margin_is_one_of_the_combined_score():
    scores = {"s": rows("p", [0.0, 0.5, 1.0])}
    spread = 2 * np.sqrt(1.5)
    for margin, kept in ((spread - 1e-9, 1), (spread + 1e-9, 0)):
        assert choose(scores, {"p": ""}, settings(min_margin=margin))[1]["pairs"] == kept


TIES = {"best_worst": 1, "all_above_margin": 6, "top_k_bottom_k": 4, "ranked": 1}


@pytest.mark.parametrize("method", preferences.NORMALIZATIONS)
@pytest.mark.parametrize("strategy", preferences.STRATEGIES)
def test_rounding_makes_no_preference(method, strategy):
    vqa = np.float32(0.7) + np.array([0, 1, 2, 0], np.float32) * np.float32(6e-8)
    scores = {"s": rows("p", vqa.tolist(), clip=[23.1] * 4)}
    choices, counts = choose(scores, {"p": ""}, settings(normalize=method, strategy=strategy))
    assert not choices and counts["ties"] == TIES[strategy]


def test_choose_refuses():
    without = Scored(["p"], [0], {"clip": np.ones(1), "b": np.ones(1)})
    with pytest.raises(ValueError, match="no column 'vqa'.* they have clip, b"):
        choose({"s": without}, {"p": ""}, settings())
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
        ({"k": 0}, "k=0: expected 1 or more"),
        ({"min_questions": -1}, "min_questions=-1: expected 0 or more"),
        ({"license": "mit\nevil: 1"}, "license=.*expected the name that the Hugging Face Hub"),
        ({"license": ""}, "license=''"),
        ({"strategy": "ranked", "shuffle_labels": True}, "shuffle_labels=True makes pairs"),
        ({"strategy": "ranked", "path": "a"}, "path='a' makes pairs"),
        ({"path": "a", "max_rows": -1}, "max_rows=-1: expected 0 or more"),
        ({"path": "a", "max_bad": 1.5}, "max_bad=1.5: expected 0 to 1"),
        ({"path": "a", "columns": {"label": ""}}, "a column's name for each of caption, first"),
        ({"path": "a", "columns": {"label": "caption"}}, "a different column for each"),
    ],
)
def test_check_settings(changes, message):
    preferences.check_settings(settings(), of_people=False)
    preferences.check_settings(settings(path="a", weights={}), of_people=True)
    preferences.check_settings(settings(path="a", strategy="ranked"), of_people=False)
    with pytest.raises(ValueError, match=message):
        preferences.check_settings(settings(**changes), of_people="path" in changes)


def test_shuffle_labels_swaps_half_and_depends_on_the_pair_alone():
    choices = [Choice("s", f"p{n}", (n % 3, 3 + n % 2), (1.0, 0.0)) for n in range(400)]
    shuffled = preferences.shuffle_labels(choices, 0, 0)
    swapped = [a.candidates != b.candidates for a, b in zip(choices, shuffled, strict=True)]
    assert 150 < sum(swapped) < 250
    for before, after in zip(choices, shuffled, strict=True):
        assert after.pair_id == before.pair_id
        assert dict(zip(*after[2:], strict=True)) == dict(zip(*before[2:], strict=True))
        assert after.candidates in (before.candidates, before.candidates[::-1])
    assert preferences.shuffle_labels(choices[7:], 0, 0) == shuffled[7:]
    assert preferences.shuffle_labels(choices, 1, 0) != shuffled
    assert preferences.shuffle_labels(choices, 0, 1) != shuffled


def test_what_is_counted_has_words():
    told = {name: count.text for name, count in preferences.COUNTS.items()}
    assert told["ties"] == "ties" and told["pairs"] == "pairs (or rankings) kept"
    assert told["few_questions"] == "prompts with fewer questions than the minimum"
    units = {count.of for count in preferences.COUNTS.values()}
    assert units == {"pairs", "prompts", "candidates", "imported rows"}
