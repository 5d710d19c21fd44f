"""Metrics of trainings that go well and wrong, and what is said of them."""

import math

import pytest

from agfsync_jax.training.symptoms import WINDOW, Symptoms


def row(chosen, rejected):
    margin = chosen - rejected
    return {
        "loss": 0.5,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margin": margin,
        "rewards/weight": 1 / (1 + math.exp(margin)),
    }


def said(chosen, rejected, steps=4 * WINDOW):
    """(step, line) of what a training says whose rewards move so much a step."""
    symptoms = Symptoms()
    lines = [symptoms.see(row(chosen * step, rejected * step)) for step in range(steps)]
    return [(step, line) for step, line in enumerate(lines) if line], symptoms


def test_both_images_get_worse():
    ((step, line),), symptoms = said(-0.01, -0.02)
    assert step == 2 * WINDOW - 1  # as soon as there are two means, and never again
    assert "worse at both images: chosen reward -0.74, rejected -1.5" in line
    assert not symptoms.is_saturated


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(0.01, -0.02), (-0.02, 0.01), (-0.02, -0.01), (0.02, 0.01)],
    ids=["right", "wrong", "the chosen more", "better at both"],
)
def test_others_are_left_alone(chosen, rejected):
    lines, _ = said(chosen, rejected)
    assert lines == []


def test_pairs_that_teach_nothing_more():
    _, symptoms = said(0.0, -0.05, steps=3 * WINDOW)
    assert symptoms.is_saturated
    symptoms = Symptoms()
    for step in range(2 * WINDOW):  # a large mean margin, and half of the pairs the wrong way
        symptoms.see(row(9.0, 0.0) | {"rewards/weight": 0.3 + step * 1e-4})
    assert not symptoms.is_saturated


def test_a_loss_without_rewards_has_none():
    symptoms = Symptoms()
    assert not any(symptoms.see({"loss": 1.0}) for _ in range(3 * WINDOW))
    assert not symptoms.is_saturated
