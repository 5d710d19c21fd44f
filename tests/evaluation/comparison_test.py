"""Means, paired differences and win rates of two models' scores."""

import numpy as np
import pytest

from agfsync_jax.evaluation.comparison import compare


def rows(**columns):
    length = len(next(iter(columns.values())))
    keys = [{"prompt_id": f"p{i // 2}", "candidate": i % 2} for i in range(length)]
    return [
        key | {name: values[i] for name, values in columns.items()} for i, key in enumerate(keys)
    ]


def test_compare():
    base = rows(clip=[1.0, 2.0, 3.0, 4.0], **{"clip/part": [0.0] * 4})
    tuned = rows(clip=[1.0, 3.0, 2.5, 5.0], **{"clip/part": [0.0] * 4})
    means, comparison = compare(base, tuned[::-1])
    assert list(means["base"]) == ["clip"]
    assert means["base"]["clip"]["mean"] == 2.5
    assert comparison["delta"]["clip"]["mean"] == pytest.approx(0.375)
    assert comparison["win_rate"]["clip"]["mean"] == pytest.approx(2.5 / 4)  # two wins and a tie
    same = compare(base, base)[1]
    assert same["delta"]["clip"] == {"mean": 0, "low": 0, "high": 0}
    assert same["win_rate"]["clip"] == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_compare_is_paired_and_over_prompts():
    """Prompts that differ much, all better by a bit: the difference is sure, the means are not."""
    level = np.repeat(np.random.default_rng(0).normal(size=50), 2)
    means, comparison = compare(rows(clip=level), rows(clip=level + 0.01))
    interval = means["base"]["clip"]
    assert interval["high"] - interval["low"] > 0.2
    assert comparison["delta"]["clip"]["low"] == pytest.approx(0.01)


def test_compare_refuses_what_does_not_match():
    base = rows(clip=[1.0, 2.0])
    with pytest.raises(ValueError, match="same images, got 2 and 1 rows"):
        compare(base, base[:1])
    with pytest.raises(ValueError, match="clip: no image has a finite score of both models"):
        compare(base, rows(clip=[float("inf"), float("nan")]))


def test_images_without_a_score_are_left_out_of_that_metric_alone():
    base = rows(clip=[1.0, 2.0, 3.0, float("nan")], vqa=[0.0, 1.0, 1.0, 1.0])
    tuned = rows(clip=[2.0, float("nan"), 5.0, 6.0], vqa=[1.0, 1.0, 1.0, 1.0])
    means, comparison = compare(base, tuned)
    assert comparison["left_out"] == {"clip": 2}
    assert means["base"]["clip"]["mean"] == 2.0 and means["tuned"]["clip"]["mean"] == 3.5
    assert comparison["delta"]["clip"]["mean"] == 1.5
    assert comparison["delta"]["vqa"]["mean"] == 0.25
    assert "left_out" not in compare(tuned[:1], tuned[:1])[1]
