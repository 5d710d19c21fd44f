import numpy as np

from agfsync_jax.utils import metrics


def test_rows_past_the_restored_step_are_dropped(tmp_path):
    path = tmp_path / "checkpoints" / "metrics.jsonl"
    with metrics.MetricWriter(path) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": np.float32(step)})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with metrics.MetricWriter(path, step=2) as writer:
        writer.write(3, {"loss": 30})
    rows = metrics.read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_step_zero_starts_afresh(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics.MetricWriter(path) as writer:
        writer.write(1, {"loss": 1.0})
    with metrics.MetricWriter(path):
        pass
    assert metrics.read_metrics(path) == []


def test_a_disabled_writer_writes_nothing(tmp_path):
    with metrics.MetricWriter(tmp_path / "metrics.jsonl", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
