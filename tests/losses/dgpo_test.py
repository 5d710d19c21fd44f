"""Two candidates, and what the formula of DGPO does not say: metrics and groups that are equal."""

import jax
import jax.numpy as jnp
import numpy as np

from agfsync_jax.losses import dgpo, diffusion_dpo, group_advantages

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (jnp.asarray(RNG.uniform(0.1, 0.4, (6, 2)), jnp.float32) for _ in range(2))
FIRST_IS_BETTER = jnp.tile(jnp.array([7.0, 3.0]), (6, 1))
ALL = jnp.ones((6, 2), bool)


def test_two_candidates_are_diffusion_dpo_divided_by_beta():
    def listed(policy):
        values, _ = dgpo.loss(policy, REFERENCE, FIRST_IS_BETTER, ALL, beta=9.0)
        return jnp.mean(values)

    def paired(policy):
        errors = (*policy.T, *REFERENCE.T)
        return jnp.mean(diffusion_dpo.loss(*errors, beta=9.0)[0])

    np.testing.assert_allclose(
        jax.grad(listed)(POLICY), jax.grad(paired)(POLICY) / 9.0, rtol=1e-5, atol=1e-9
    )


def test_scores_have_no_scale_and_equal_ones_no_say():
    wide = group_advantages(1000 * FIRST_IS_BETTER - 5, ALL)
    np.testing.assert_allclose(wide, group_advantages(FIRST_IS_BETTER, ALL), rtol=1e-5)
    gradient = jax.grad(
        lambda policy: jnp.sum(dgpo.loss(policy, REFERENCE, 0 * FIRST_IS_BETTER + 0.3, ALL)[0])
    )(POLICY)
    np.testing.assert_array_equal(gradient, 0)
    _, metrics = dgpo.loss(POLICY, REFERENCE, 0 * FIRST_IS_BETTER + 0.3, ALL)
    assert metrics["rewards/equal_groups"] == 1.0 and metrics["rewards/accuracy"] == 0.0


def test_metrics_are_those_of_the_pairs():
    _, metrics = dgpo.loss(POLICY, REFERENCE, FIRST_IS_BETTER, ALL, beta=9.0)
    _, wanted = diffusion_dpo.loss(*POLICY.T, *REFERENCE.T, beta=9.0)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-6)
    accuracy = np.mean(wanted["rewards/accuracy"])
    np.testing.assert_allclose(metrics["rewards/accuracy"], accuracy, rtol=1e-6)
    assert metrics["rewards/equal_groups"] == 0.0
