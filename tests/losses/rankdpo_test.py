"""What the formula of RankDPO does not say: padding, metrics, and two candidates alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.losses import diffusion_dpo, rankdpo

POLICY = jnp.array([[0.1, 0.3, 0.2, 0.15], [0.2, 0.1, 0.4, 0.3]])
REFERENCE = jnp.array([[0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.3, 0.3]])
SCORES = jnp.array([[3.0, -1.0, 2.0, 0.5], [10.0, 30.0, 20.0, 20.0]])


@jax.jit
def listwise(policy, reference, scores, mask):
    """The gradient, loss [b] and metrics."""

    def total(policy):
        loss, metrics = rankdpo.loss(policy, reference, scores, mask, beta=10.0)
        return jnp.sum(loss), (loss, metrics)

    gradient, (loss, metrics) = jax.grad(total, has_aux=True)(policy)
    return gradient, loss, metrics


def test_two_candidates_are_diffusion_dpo_with_a_weight():
    scores = SCORES[:, :2]
    errors = POLICY[:, :2], REFERENCE[:, :2]
    _, listed, metrics = listwise(*errors, scores, jnp.ones((2, 2), bool))
    order = np.argsort(-np.asarray(scores), axis=1)
    ordered = (np.take_along_axis(np.asarray(x), order, axis=1).T for x in errors)
    paired, pair_metrics = diffusion_dpo.loss(*(x for pair in ordered for x in pair), beta=10.0)
    weight = 1 / np.log(2) - 1 / np.log(3)  # and a gain of 2^1 - 2^0
    np.testing.assert_allclose(listed, weight * paired, rtol=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin"):
        np.testing.assert_allclose(metrics[name], pair_metrics[name], rtol=1e-6)
    accuracy = np.mean(pair_metrics["rewards/accuracy"])
    np.testing.assert_allclose(metrics["rewards/accuracy"], accuracy)


def test_padding_changes_nothing_whatever_it_holds():
    three = POLICY[:, :3], REFERENCE[:, :3], SCORES[:, :3], jnp.ones((2, 3), bool)
    padded = [
        jnp.pad(x, ((0, 0), (1, 2)), constant_values=value)
        for x, value in zip(three, (jnp.nan, jnp.nan, 99.0, False), strict=True)
    ]
    expected_gradient, *expected = listwise(*three)
    gradient, *result = listwise(*padded)
    np.testing.assert_allclose(gradient, np.pad(expected_gradient, ((0, 0), (1, 2))), rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), result, expected)


def test_accuracy_counts_all_pairs_that_differ():
    # Rewards fall with policy - reference: list 0 has -.1 .1 0 -.05, list 1 has 0 -.1 .1 0.
    mask = jnp.ones((2, 4), bool)
    *_, metrics = listwise(POLICY, REFERENCE, SCORES, mask)
    # List 0: six pairs, of which 2 over 0.5 is wrong. List 1: five, 20 over 10 is wrong, the other
    # 20 over 10 has equal rewards, which is half right.
    np.testing.assert_allclose(metrics["rewards/accuracy"], 8.5 / 11, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/chosen"], [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], [-0.5, 0.0], rtol=1e-5, atol=1e-6)
    *_, metrics = listwise(POLICY, REFERENCE, 0 * SCORES, mask)
    assert metrics["rewards/accuracy"] == 0.0  # there is no pair, and no division by none
