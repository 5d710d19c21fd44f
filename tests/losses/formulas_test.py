"""Every loss and its gradient against its formula, from whole residuals, in torch float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from agfsync_jax.losses import Residuals
from agfsync_jax.utils import modules

RNG = np.random.default_rng(0)
LATENT = 4, 4, 4
# Policies that are better and worse than the reference on the whole; candidates in axis 1.
REFERENCE = RNG.normal(size=(5, 4, *LATENT))
POLICIES = [share * REFERENCE + 0.2 * RNG.normal(size=REFERENCE.shape) for share in (0.9, 1.0)]
TARGET = RNG.normal(size=REFERENCE.shape)
# A tie, a list of three, of one and of none.
SCORES = RNG.normal(size=(5, 4))
SCORES[0, 1] = SCORES[0, 2]
SCALE = np.array([5.0, 1.0, 0.7, 0.5, 0.3])
MASK = np.arange(4) < np.array([4, 4, 3, 1, 0])[:, None]
SETTINGS = {
    "diffusion_dpo": {"beta": 40.0, "margin_cap": 1.0, "anchor": 0.6},
    "diffusion_nft": {"beta": 0.7, "max_advantage": 1.2},
    "smpo": {"beta": 40.0, "gamma": 1.5},
    "mapo": {"beta": 0.3, "snr_value": 0.7, "num_train_timesteps": 10},
    "kto": {"beta": 20.0, "desirable_weight": 1.3, "undesirable_weight": 0.6},
    "cdpo": {"beta": 20.0, "label_smoothing": 0.2},
    "dspo": {"beta": 3.0},
    "agfsync_norm": {"beta": 1.0},
    "sft": {},
}


def settings(name):
    return dict(SETTINGS.get(name, {"beta": 40.0}))


def error(residual):
    """The squared norm as a mean: [b n]."""
    return (residual**2).mean(dim=(2, 3, 4))


def inside(policy, reference, beta):
    """The argument of the sigmoid in arXiv:2311.12908, eq. 14, with T omega(lambda) in beta."""
    change = error(policy) - error(reference)
    return -beta / 2 * (change[:, 0] - change[:, 1])


def diffusion_dpo(policy, reference, beta, margin_cap, anchor):
    """With its guards: the margin at most the cap, and a price for a chosen that got worse."""
    margin = torch.clamp(inside(policy, reference, beta), max=margin_cap)
    worse = torch.clamp(error(policy)[:, 0] - error(reference)[:, 0], min=0)
    return (-logsigmoid(margin) + anchor * beta / 2 * worse).mean()


def smpo(policy, reference, beta, gamma):
    """arXiv:2506.02698, eq. 9; a pair after the other."""
    margin = inside(policy, reference, beta)
    total = 0.0
    for row, (chosen, rejected) in enumerate(SCORES[:, :2]):
        alpha = gamma * np.exp(chosen) / (np.exp(chosen) + np.exp(rejected))
        total -= logsigmoid((2 * alpha - gamma) * margin[row])
    return total / len(margin)


def cdpo(policy, reference, beta, label_smoothing):
    argument = inside(policy, reference, beta)
    swapped = inside(policy.flip(1), reference.flip(1), beta)
    mixed = (1 - label_smoothing) * logsigmoid(argument) + label_smoothing * logsigmoid(swapped)
    return -mixed.mean()


def hinge(policy, reference, beta):
    return torch.clamp(1 - inside(policy, reference, beta), min=0).mean()


def ipo(policy, reference, beta):
    """arXiv:2310.12036, eq. 17, with tau = beta, times beta^2."""
    log_ratio = inside(policy, reference, 1.0)
    return beta**2 * ((log_ratio - 1 / (2 * beta)) ** 2).mean()


def kto(policy, reference, beta, desirable_weight, undesirable_weight):
    """arXiv:2404.04465, eq. 8, an image at a time; minus the utility, plus the weight."""
    value = (beta / 2 * (error(reference) - error(policy))).T.reshape(-1)  # chosen, then rejected
    count = len(value) // 2
    baseline = max(0.0, value.detach().mean().item())
    terms = [
        desirable_weight * (1 - torch.sigmoid(x - baseline))
        if index < count
        else undesirable_weight * (1 - torch.sigmoid(-(x - baseline)))
        for index, x in enumerate(value)
    ]
    return torch.stack(terms).mean()


def mapo(policy, reference, beta, snr_value, num_train_timesteps):
    scaled = snr_value * error(policy)
    likelihood = scaled / (torch.exp(scaled) - 1)
    ratio = logsigmoid(num_train_timesteps * (likelihood[:, 0] - likelihood[:, 1]))
    return error(policy)[:, 0].mean() - beta * ratio.mean()


def dspo(policy, reference, beta):
    share = 1 - torch.sigmoid(inside(policy, reference, beta))[:, None, None, None]
    learned = policy[:, 0] - reference[:, 0]
    return ((policy[:, 0] - beta * share * learned) ** 2).mean()


def sft(policy, reference):
    return (policy[:, 0] ** 2).mean()


def agfsync_norm(policy, reference, beta):
    change = [torch.norm(policy[:, i]) - torch.norm(reference[:, i]) for i in (0, 1)]
    return -logsigmoid(-beta * (change[0] - change[1]))


def rankdpo(policy, reference, beta):
    """arXiv:2410.18013, algorithm 2, with the win rates of its algorithm 1."""
    change = beta / 2 * (error(policy) - error(reference))
    total = 0.0
    for row in range(len(SCORES)):
        present = [i for i in range(4) if MASK[row, i]]
        wins = {i: sum(SCORES[row, i] > SCORES[row, j] for j in present) for i in present}
        preferred = {i: wins[i] / max(len(present) - 1, 1) for i in present}
        descending = sorted(preferred.values(), reverse=True)
        discount = {i: np.log(1 + 1 + descending.index(preferred[i])) for i in present}
        for i in present:
            for j in present:
                if preferred[i] > preferred[j]:
                    gain = 2 ** preferred[i] - 2 ** preferred[j]
                    weight = abs(gain) * abs(1 / discount[i] - 1 / discount[j])
                    total -= weight * logsigmoid(-(change[row, i] - change[row, j]))
    return total / len(SCORES)


def dgpo(policy, reference, beta):
    """A group after the other: the weight of arXiv:2510.08425's code, detached, then the errors."""
    total = 0.0
    own, other = error(policy), error(reference)
    for row in range(len(SCORES)):
        present = [i for i in range(4) if MASK[row, i]]
        values = np.array([SCORES[row, i] for i in present])
        if len(present) < 2 or values.std() == 0:
            continue
        advantages = (values - values.mean()) / values.std()
        size = len(present)
        held = sum(
            a * beta * (own - other)[row, i] / size
            for a, i in zip(advantages, present, strict=True)
        )
        weight = torch.sigmoid(held).detach()
        total += sum(
            weight * a * own[row, i] / size for a, i in zip(advantages, present, strict=True)
        )
    return total / len(SCORES)


def advantages_of(row):
    """{candidate: advantage} of a group that is not empty; 0 where all are equal."""
    present = [i for i in range(4) if MASK[row, i]]
    values = np.array([SCORES[row, i] for i in present])
    apart = (values - values.mean()) / (values.std() or 1)
    return dict(zip(present, apart, strict=True))


def diffusion_nft(policy, reference, beta, max_advantage, scale=SCALE):
    """scripts/train_nft_sd3.py, an image at a time, with x0 estimates less x0 = scale * residual;
    scales above 1 are 1."""
    total = 0.0
    for row in range(len(SCORES)):
        group = advantages_of(row) if MASK[row].any() else {}
        for i, advantage in group.items():
            r = np.clip(advantage, -max_advantage, max_advantage) / max_advantage / 2 + 0.5
            new, old = (min(scale[row], 1.0) * each[row, i] for each in (policy, reference))
            plus, minus = beta * new + (1 - beta) * old, (1 + beta) * old - beta * new
            plus, minus = (
                (x**2 / x.detach().abs().mean().clip(min=1e-5)).mean() for x in (plus, minus)
            )
            value = (r * plus / beta + (1 - r) * minus / beta) * max_advantage
            total += value / len(group)
    return total / len(SCORES)


FORMULAS = {
    formula.__name__: formula
    for formula in (
        *(diffusion_dpo, cdpo, hinge, ipo, kto, mapo, dspo, sft, agfsync_norm, rankdpo, dgpo),
        *(smpo, diffusion_nft),
    )
}


@functools.cache
def ours(name):
    """Compiled: predictions [b n 4 4 4] of the policy -> ((mean loss, metrics), gradient)."""
    loss = modules.load("losses", name).LOSS.configured(**settings(name))
    count = 4 if loss.is_listwise else 2

    def mean_loss(prediction):
        residuals = Residuals(
            prediction[:, :count] - TARGET[:, :count],
            jnp.asarray(REFERENCE[:, :count]) if loss.uses_reference else None,
            jnp.asarray(SCORES[:, :count]),
            jnp.asarray(MASK[:, :count]),
            jnp.asarray(SCALE),
        )
        values, metrics = loss(residuals)
        return jnp.mean(values), metrics

    return jax.jit(jax.value_and_grad(mean_loss, has_aux=True))


@pytest.mark.parametrize("policy", POLICIES, ids=["better", "worse"])
@pytest.mark.parametrize("name", modules.names("losses"))
def test_value_and_gradient(name, policy):
    assert name in FORMULAS, f"write the formula of {name} here"
    prediction = torch.tensor(TARGET + policy, requires_grad=True)
    count = 4 if name in ("rankdpo", "dgpo", "diffusion_nft") else 2
    residual = (prediction - torch.tensor(TARGET))[:, :count]
    expected = FORMULAS[name](residual, torch.tensor(REFERENCE)[:, :count], **settings(name))
    expected.backward()
    with jax.enable_x64(True):
        (value, _), gradient = ours(name)(jnp.asarray(prediction.detach().numpy()))
        assert value.dtype == gradient.dtype == np.float64
        value, gradient = np.asarray(value), np.asarray(gradient)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, prediction.grad.numpy(), rtol=1e-6, atol=1e-12)
    assert np.abs(gradient).max() > 1e-6


def test_the_policies_reach_both_branches():
    """Else the formulas would not see KTO's clamp or hinge's flat part."""
    reference = torch.tensor(REFERENCE)[:, :2]
    better, worse = (torch.tensor(policy)[:, :2] for policy in POLICIES)
    assert (error(reference) - error(better)).mean() > 0 > (error(reference) - error(worse)).mean()
    for policy in (better, worse):
        margins = inside(policy, reference, settings("hinge")["beta"])
        assert (margins > 1).any() and (margins < 1).any()
    assert (error(worse) - error(reference))[:, 0].max() > 0  # where Diffusion-DPO's anchor pulls
    advantages = np.concatenate([list(advantages_of(row).values()) for row in range(4)])
    assert (np.abs(advantages) > 1.2).any() and (np.abs(advantages) < 1.2).any()
