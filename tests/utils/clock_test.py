import json
import threading

import pytest

from agfsync_jax.utils import clock


class Time:
    """A clock that the test turns."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(clock.time, "monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch):
    return Time(monkeypatch)


def _stages(folder):
    return json.loads((folder / "stages.json").read_text())


def test_adds_up_over_restarts(tmp_path, time):
    for items, seconds in ((10, 5.0), (30, 15.0)):
        with clock.Stage(tmp_path, "sample") as stage, stage.progress(items) as progress:
            time.now += seconds
            progress.update(items)
    assert _stages(tmp_path) == {"sample": {"seconds": 20.0, "items": 40, "items_per_second": 2.0}}


def test_a_stopped_stage_counts_what_it_did(tmp_path, time):
    with pytest.raises(KeyboardInterrupt), clock.Stage(tmp_path, "score") as stage:
        for item in stage.progress(range(10)):
            time.now += 1.0
            if item == 4:
                raise KeyboardInterrupt
    assert _stages(tmp_path)["score"] == {"seconds": 5.0, "items": 4, "items_per_second": 0.8}


def test_a_stage_with_nothing_to_do_keeps_the_figures(tmp_path, time, capfd):
    with clock.Stage(tmp_path, "sample") as stage, stage.progress(4) as progress:
        time.now += 2.0
        progress.update(4)
    before = _stages(tmp_path)
    with clock.Stage(tmp_path, "sample") as stage:
        time.now += 1.0
        stage.skipped(4, 4)
    assert _stages(tmp_path) == before
    assert "sample: skipped 4 of 4 shards already there" in capfd.readouterr().err


def test_the_clock_stands_still_in_a_pause(tmp_path, time):
    with clock.Stage(tmp_path, "train", unit="pairs") as stage:
        time.now += 1.0
        with stage.pause():
            time.now += 50.0
        time.now += 1.0
        stage.progress(8).update(8)
    assert _stages(tmp_path)["train"]["seconds"] == 2.0


def test_long_work_is_estimated_once_from_steady_steps(tmp_path, time, capfd):
    with clock.Stage(tmp_path, "sample") as stage, stage.progress(1000) as progress:
        for seconds in (40.0, 4.0, 4.0, 4.0):  # the first step compiles
            time.now += seconds
            progress.update(50)
    err = capfd.readouterr().err
    assert err.count("about") == 1
    # 44 s are gone and 900 images are left at 12.5 a second
    assert "sample: about 2 min for 1000 images" in err


def test_what_is_done_once_has_no_part_in_the_estimate(tmp_path, time, capfd):
    with clock.Stage(tmp_path, "train") as stage, stage.progress(1000) as progress:
        for seconds, once in ((40.0, 40.0), (4.0, 0.0), (304.0, 300.0), (4.0, 0.0)):
            time.now += seconds
            progress.leave_out(once)
            progress.update(50)
    err = capfd.readouterr().err
    assert "train: 150/1000 images, 12.5/s, 1 min left" in err


def test_short_work_is_not_estimated(tmp_path, time, capfd):
    with clock.Stage(tmp_path, "sample") as stage, stage.progress(100) as progress:
        for _ in range(4):
            time.now += 4.0
            progress.update(25)
    assert "about" not in capfd.readouterr().err


def test_plain_lines_come_every_ten_seconds(tmp_path, time, capfd):
    with clock.Stage(tmp_path, "sample") as stage, stage.progress(100, "base") as progress:
        for _ in range(100):
            time.now += 0.5
            progress.update()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 6  # five on the way and the last
    assert lines[0] == "sample: base 20/100 images, 2/s, 40 s left"
    assert lines[-1] == "sample: 100 images in 50 s (2/s)"


def test_a_killed_stage_loses_ten_seconds_at_most(tmp_path, time):
    stage = clock.Stage(tmp_path, "sample").__enter__()
    progress = stage.progress(100)
    for _ in range(25):
        time.now += 1.0
        progress.update()
    assert _stages(tmp_path)["sample"]["items"] == 20


def test_a_bar_on_a_terminal(tmp_path, time, monkeypatch, capfd):
    monkeypatch.setattr(clock.sys.stderr, "isatty", lambda: True, raising=False)
    with clock.Stage(tmp_path, "sample") as stage:
        list(stage.progress([1, 2, 3]))
        list(stage.progress(iter("ab"), "without a length"))
    assert "sample" in capfd.readouterr().err
    assert _stages(tmp_path)["sample"]["items"] == 5


def test_a_first_batch_that_takes_long_is_told_of(tmp_path, monkeypatch, capfd):
    """Compiling says nothing of itself, for minutes."""
    monkeypatch.setattr(clock, "COMPILING_LINE_SECONDS", 0.05)
    with clock.Stage(tmp_path, "sample") as stage, stage.progress(2) as progress:
        told = ""
        while told.count("sample: compiling, and running the first batch: ") < 2:
            told += capfd.readouterr().err
        progress.update()
        threading.Event().wait(0.15)
        capfd.readouterr()
        threading.Event().wait(0.2)
        assert "compiling" not in capfd.readouterr().err
