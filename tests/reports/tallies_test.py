"""Figures about pairs, against plain formulas."""

import numpy as np
import pytest

from agfsync_jax.reports import tallies

PROMPTS = np.array([0, 0, 0, 1, 1, 2, 2, 2])
X = np.array([0.1, 0.4, np.nan, 0.9, 0.3, 0.5, 0.7, 0.2])
Y = np.array([3.0, 1.0, 2.0, 5.0, 4.0, np.nan, 9.0, 7.0])


def test_spread_is_that_of_prompts_against_that_of_all():
    groups = [[0.1, 0.4], [0.9, 0.3], [0.5, 0.7, 0.2]]
    found = tallies.spread(PROMPTS, X)
    assert found.within == pytest.approx(np.mean([np.std(g) for g in groups]))
    assert found.overall == pytest.approx(np.nanstd(X))
    assert found.share == pytest.approx(found.within / found.overall)
    assert np.isnan(tallies.spread(np.array([0, 1]), np.array([1.0, 2.0])).within)
    constant = tallies.spread(PROMPTS, np.full(8, 0.1) + 1e-9 * np.arange(8))
    assert constant.overall == 0 and np.isnan(constant.share)
    assert np.isnan(tallies.spread(PROMPTS, np.full(8, np.nan)).overall)


def test_correlations_leave_out_what_is_not_known():
    both = np.isfinite(X) & np.isfinite(Y)
    expected = np.corrcoef(X[both], Y[both])
    found = tallies.correlations([X, Y])
    assert found[0, 1] == found[1, 0] == pytest.approx(expected[0, 1])
    np.testing.assert_allclose(np.diag(found), 1)
    x, y = X.copy(), Y.copy()
    for prompt in range(3):
        at = both & (PROMPTS == prompt)
        x[at] -= x[at].mean()
        y[at] -= y[at].mean()
    within = tallies.correlations([X, Y], PROMPTS)[0, 1]
    assert within == pytest.approx(np.corrcoef(x[both], y[both])[0, 1])
    level = PROMPTS + 1 / 3
    assert np.isnan(tallies.correlations([X, level], PROMPTS)[0, 1])


def test_agreement_adds_up():
    chosen = np.array([1.0, 2.0, 3.0, np.nan, 0.1, 5.0])
    rejected = np.array([0.0, 3.0, 3.0, 1.0, np.float64(np.float32(0.1)), 4.0])
    assert tallies.agreement(chosen, rejected) == pytest.approx((2 / 5, 2 / 5, 1 / 5))
    assert np.isnan(tallies.agreement(chosen * np.nan, rejected)).all()


def test_wins_and_their_bias():
    prompts = np.repeat(np.arange(50), 2)
    found = tallies.wins(prompts, np.tile([0, 0], 50), np.tile([1, 2], 50))
    assert found[0] == tallies.Wins(100, 0, 50) and found[2] == tallies.Wins(0, 50, 50)
    assert found[0].share == 1.0 and found[0].is_biased and found[2].is_biased
    even = tallies.wins(prompts, np.tile([0, 1], 50), np.tile([1, 0], 50))
    assert even[0].share == 0.5 and not even[0].is_biased
    assert not tallies.Wins(4, 0, 4).is_biased  # four in a row happen
    assert not tallies.Wins(5_500, 4_500, 10_000).is_biased  # sure, and small


def test_disagreement_is_the_weaker_side():
    differences = np.array([[2.0, 1.0, -1.0, np.nan], [-1.0, 3.0, -2.0, 1.0]])
    found = tallies.disagreement(differences, [1.0, 0.5])
    np.testing.assert_allclose(found, [2.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(tallies.disagreement(differences, [0.0, 0.5]), 0)
    np.testing.assert_allclose(tallies.disagreement(np.zeros((0, 3)), []), 0)
