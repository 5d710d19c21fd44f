"""Learning rates, updates beside those of other libraries, and settings that are refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.optimization import Adafactor

from agfsync_jax.training.optimizer import make_optimizer, with_lora_alpha


def test_learning_rate_schedules():
    with pytest.raises(ValueError, match="warmup_steps=9 .* below train.num_steps=9"):
        make_optimizer(learning_rate=1, num_steps=9, warmup_steps=9, schedule="cosine")
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        make_optimizer(learning_rate=1, num_steps=9, max_grad_norm=-1)
    _, rate = make_optimizer(learning_rate=2.0, num_steps=10, warmup_steps=2, schedule="cosine")
    got = [float(rate(step)) for step in range(11)]
    cosine = [1 + math.cos(math.pi * step / 8) for step in range(9)]
    np.testing.assert_allclose(got, [2 / 3, 4 / 3, *cosine], atol=1e-6)
    _, rate = make_optimizer(learning_rate=2.0, num_steps=10)
    assert float(rate(0)) == float(rate(9)) == 2.0


def gradients(steps):
    """Of a matrix and a vector; one step in three is a hundred times as large."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        size = 100.0 if step % 3 == 2 else 1.0
        yield {
            name: (size * rng.normal(size=shape)).astype(np.float32)
            for name, shape in (("kernel", (256, 192)), ("bias", (192,)))
        }


def trained(steps, **settings):
    """(start, end) of parameters after some steps of our optimizer."""
    rng = np.random.default_rng(1)
    start = {n: rng.normal(size=g.shape).astype(np.float32) for n, g in next(gradients(1)).items()}
    optimizer, _ = make_optimizer(num_steps=steps, **settings)
    params, state = jax.tree.map(jnp.asarray, start), None
    state = optimizer.init(params)
    for grads in gradients(steps):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return start, params


def test_adafactor_is_that_of_transformers():
    """As Diffusion-DPO's code trains SDXL: no momentum, no clipping by norm, updates clipped."""
    start, ours = trained(
        7, learning_rate=0.01, optimizer="adafactor", weight_decay=0.1, max_grad_norm=0
    )
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = Adafactor(
        theirs.values(),
        lr=0.01,
        weight_decay=0.1,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
    )
    for grads in gradients(7):
        for name, value in theirs.items():
            value.grad = torch.tensor(grads[name])
        optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach(), rtol=1e-4, atol=1e-6)
        assert np.abs(ours[name] - start[name]).max() > 0.01


def test_adamw_is_that_of_torch():
    start, ours = trained(7, learning_rate=0.01, weight_decay=0.1, max_grad_norm=2.0)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.1)
    for grads in gradients(7):
        for name, value in theirs.items():
            value.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_lion_is_that_of_its_paper():
    """arXiv:2302.06675, algorithm 2, in float64."""
    start, ours = trained(
        7, learning_rate=0.01, optimizer="lion", weight_decay=0.1, max_grad_norm=0
    )
    for name, value in start.items():
        theta, momentum = value.astype(np.float64), 0.0
        for grads in gradients(7):
            grad = grads[name].astype(np.float64)
            update = np.sign(0.9 * momentum + 0.1 * grad)
            theta = theta - 0.01 * (update + 0.1 * theta)
            momentum = 0.99 * momentum + 0.01 * grad
        np.testing.assert_allclose(ours[name], theta, rtol=1e-5, atol=1e-5)


def test_gradients_are_clipped_only_where_wanted():
    rate = {"learning_rate": 0.5, "optimizer": "lion", "weight_decay": 0.0}
    grads = {"x": jnp.array([30.0, 40.0])}
    for norm, want in ((0, 50.0), (5.0, 5.0)):
        optimizer, _ = make_optimizer(num_steps=1, max_grad_norm=norm, **rate)
        _, state = optimizer.update(grads, optimizer.init(grads), grads)
        (momentum,) = (x for x in jax.tree.leaves(state) if x.shape == (2,))
        np.testing.assert_allclose(jnp.linalg.norm(momentum), 0.01 * want, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "lion"])
def test_lora_alpha_is_a_factor_on_the_product(optimizer):
    """Adapters that hold it learn as those of PEFT, which are multiplied by alpha / rank."""
    rng, ratio = np.random.default_rng(0), 4.0
    target, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (6, 2), (2, 5)))
    made, _ = make_optimizer(
        learning_rate=0.05, num_steps=9, optimizer=optimizer, weight_decay=0.1, max_grad_norm=3.0
    )

    def train(optimizer, adapters, factor):
        def loss(tree):
            return jnp.sum(jnp.square(factor * tree["q"]["A"] @ tree["q"]["B"] - target))

        state = optimizer.init(adapters)
        for _ in range(9):
            updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
            adapters = optax.apply_updates(adapters, updates)
        return factor * adapters["q"]["A"] @ adapters["q"]["B"]

    theirs = train(made, {"q": {"A": a, "B": b}}, ratio)
    ours = train(with_lora_alpha(made, ratio), {"q": {"A": a, "B": ratio * b}}, 1.0)
    plain = train(made, {"q": {"A": a, "B": ratio * b}}, 1.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert jnp.abs(plain - theirs).max() > 0.01
