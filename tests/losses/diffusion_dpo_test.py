"""The preference loss and its gradient against the paper's formula in torch float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from agfsync_jax.diffusion.schedules import Schedule
from agfsync_jax.losses import diffusion_dpo

BETA = 200.0
RNG = np.random.default_rng(0)
CHOSEN, REJECTED, NOISE = RNG.normal(size=(3, 5, 4, 4, 3))
TIMESTEPS = np.array([10, 250, 500, 750, 990])
REFERENCE = RNG.normal(size=(3, 3)) * 0.3
POLICY = REFERENCE + RNG.normal(size=(3, 3)) * 0.02


def ours(policy, prediction_type):
    schedule = Schedule.from_config({"prediction_type": prediction_type})

    def error(weight, latents):
        arrays = jnp.asarray(latents, jnp.float32), jnp.asarray(NOISE, jnp.float32)
        arrays += (jnp.asarray(TIMESTEPS),)
        residual = schedule.add_noise(*arrays) @ weight - schedule.target(*arrays)
        return jnp.mean(jnp.square(residual), axis=(1, 2, 3))

    reference = jnp.asarray(REFERENCE, jnp.float32)
    errors = [
        error(weight, latents) for weight in (policy, reference) for latents in (CHOSEN, REJECTED)
    ]
    loss, metrics = diffusion_dpo.loss(*errors, beta=BETA)
    return jnp.mean(loss), metrics


def formula(policy, prediction_type):
    """arXiv:2311.12908, eq. 14, with T omega(lambda) in beta and the squared norm as a mean."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = torch.cumprod(1 - betas, 0)[TIMESTEPS][:, None, None, None]
    noise, reference = torch.tensor(NOISE), torch.tensor(REFERENCE)

    def error(weight, clean):
        clean = torch.tensor(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        target = noise if prediction_type == "epsilon" else velocity
        return ((target - noisy @ weight) ** 2).mean(dim=(1, 2, 3))

    chosen = error(policy, CHOSEN) - error(reference, CHOSEN)
    rejected = error(policy, REJECTED) - error(reference, REJECTED)
    return -torch.nn.functional.logsigmoid(-BETA / 2 * (chosen - rejected)).mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_value_and_gradient_equal_the_papers_formula(prediction_type):
    weight = torch.tensor(POLICY, requires_grad=True)
    expected = formula(weight, prediction_type)
    expected.backward()
    value, gradient = jax.value_and_grad(lambda p: ours(p, prediction_type)[0])(
        jnp.asarray(POLICY, jnp.float32)
    )
    assert abs(float(value) - expected.item()) < 1e-4
    np.testing.assert_allclose(gradient, weight.grad.numpy(), rtol=2e-4, atol=2e-4)


def test_policy_equal_to_reference_gives_ln_2():
    loss, metrics = ours(jnp.asarray(REFERENCE, jnp.float32), "epsilon")
    assert abs(float(loss) - np.log(2)) < 1e-6
    assert float(jnp.abs(metrics["rewards/margin"]).max()) == 0.0
    np.testing.assert_array_equal(metrics["rewards/accuracy"], 0.5)  # neither right nor wrong


def test_metrics_are_rewards():
    errors = [jnp.array(x) for x in ([0.1, 0.4], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2])]
    loss, metrics = diffusion_dpo.loss(*errors, beta=10.0)
    np.testing.assert_allclose(metrics["rewards/chosen"], [0.5, -1.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], [-0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margin"], [1.0, -1.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracy"], [1.0, 0.0])
    np.testing.assert_allclose(loss, np.log1p(np.exp([-1.0, 1.0])), rtol=1e-5)


def test_guards_are_off_unless_they_are_set_and_leave_the_metrics():
    errors = [jnp.array(x) for x in ([0.1, 0.4], [0.3, 0.2], [0.2, 0.2], [0.2, 0.2])]
    plain, metrics = diffusion_dpo.loss(*errors, beta=10.0)
    guarded, same = diffusion_dpo.loss(*errors, beta=10.0, margin_cap=0.5, anchor=2.0)
    capped = np.log1p(np.exp(-0.5))
    np.testing.assert_allclose(guarded, [capped, plain[1] + 2.0 * 1.0], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, metrics)
    gradient = jax.grad(
        lambda policy: jnp.sum(diffusion_dpo.loss(policy, *errors[1:], margin_cap=0.5)[0])
    )(errors[0])
    assert gradient[0] == 0 and gradient[1] > 0
