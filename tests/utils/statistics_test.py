import json
from pathlib import Path

import numpy as np
import pytest

from agfsync_jax.utils import statistics

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def test_bootstrap_has_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 2000)
    interval = statistics.bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert interval["mean"] == pytest.approx(values.mean())
    assert interval["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval == statistics.bootstrap(values)
    assert interval != statistics.bootstrap(values, seed=1)


def test_draws_that_are_kept_are_those_that_are_not(monkeypatch):
    values = np.random.default_rng(0).normal(size=(2, 60))
    kept = [statistics.bootstrap(each) for each in values]
    monkeypatch.setattr(statistics, "_KEPT", 0)
    monkeypatch.setattr(statistics, "_CHUNK", 7 * 60)
    assert [statistics.bootstrap(each) for each in values] == kept


def test_bootstrap_resamples_clusters():
    values = np.random.default_rng(0).normal(size=300)
    copies, clusters = np.repeat(values, 4), np.repeat(np.arange(300), 4)
    alone, clustered = statistics.bootstrap(values), statistics.bootstrap(copies, clusters)
    # Four equal rows of a prompt say no more than one.
    assert clustered == pytest.approx(alone)
    rows = statistics.bootstrap(copies)
    assert rows["high"] - rows["low"] < 0.6 * (alone["high"] - alone["low"])


def test_bootstrap_covers_the_truth():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        prompt = rng.normal(0.0, 1.0, 40)  # a prompt's own level, and two seeds of it
        values = np.repeat(prompt, 2) + rng.normal(0.0, 0.5, 80)
        interval = statistics.bootstrap(values, np.repeat(np.arange(40), 2), num=500)
        hits += interval["low"] <= 0 <= interval["high"]
    assert 180 <= hits <= 199


def test_bootstrap_takes_strings_and_clusters_of_all_sizes():
    interval = statistics.bootstrap([1.0, 1.0, 4.0], ["a", "a", "b"])
    assert interval["mean"] == pytest.approx(2.0)
    assert interval["low"] == pytest.approx(1.0) and interval["high"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], None, "at least one"),
        ([1.0, float("nan")], None, "1 of 2 values"),
        ([1.0, 2.0], ["a"], "2 values and clusters"),
    ],
)
def test_bootstrap_rejects(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        statistics.bootstrap(values, clusters)


def test_format_interval():
    interval = {"mean": 0.03, "low": -0.01, "high": 0.07}
    assert statistics.format_interval(interval, signed=True) == "+0.030 [-0.010, +0.070]"
    assert statistics.format_interval(interval, digits=2) == "0.03 [-0.01, 0.07]"


def test_tifa():
    rows = [("a", "object", 1), ("a", "color", 0), ("b", "color", 1), ("a", "object", 1)]
    found = statistics.tifa(*zip(*rows, strict=True))
    assert found["tifa_average"] == (2 / 3 + 1) / 2
    np.testing.assert_allclose(found["tifa_stdev"], np.std([2 / 3, 1], ddof=1))
    assert found["accuracy_by_type"] == {"color": 0.5, "object": 1.0}


def test_tifa_of_the_published_sample():
    """The figures that come with TIFA's code, from the answers that it recorded."""
    path = DATA / "tifa_sample_evaluation_result.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    published = json.loads(path.read_text())
    rows = [
        (caption, row["element_type"], row["multiple_choice_vqa"] == row["answer"])
        for caption, asked in published["question_details"].items()
        for row in asked.values()
    ]
    found = statistics.tifa(*zip(*rows, strict=True))
    assert found["tifa_average"] == published["tifa_average"] == 0.8125
    np.testing.assert_allclose(found["tifa_stdev"], published["tifa_stdev"], rtol=1e-12)
    assert found["accuracy_by_type"] == pytest.approx(published["accuracy_by_type"], rel=1e-12)
