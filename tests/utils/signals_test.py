import signal
import threading
import time

import pytest

from agfsync_jax.utils import signals
from agfsync_jax.utils.signals import ended_in_time, hold_signals, unhurried


@pytest.fixture(autouse=True)
def interrupting():
    """Both signals raise an exception, as they do under the command line."""

    def interrupt(number, _):
        raise KeyboardInterrupt(number)

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    yield interrupt
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_block(number, interrupting):
    done = []
    with pytest.raises(KeyboardInterrupt), hold_signals(signal.SIGINT, signal.SIGTERM) as held:
        signal.raise_signal(number)
        assert held == [number]
        done.append("the rest of the block")
    assert done
    assert signal.getsignal(number) is interrupting


def test_a_second_signal_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), hold_signals(signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    assert not done


def test_an_error_in_the_block_is_not_replaced(interrupting):
    with pytest.raises(ValueError), hold_signals(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is interrupting


def test_other_threads_hold_nothing():
    found = []

    def work():
        with hold_signals(signal.SIGTERM) as held:
            found.append(held)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [[]]


@pytest.fixture
def ended(monkeypatch):
    """What was ended, and when, where it is time after a second, or two for a step."""
    monkeypatch.setattr(signals, "ACT_SECONDS", 1.0)
    monkeypatch.setattr(signals, "STEP_SECONDS", 2.0)
    monkeypatch.delenv("AGFSYNC_STOP_SECONDS", raising=False)
    found = []
    with ended_in_time(lambda number: found.append((number, time.monotonic()))):
        yield found


def busy(seconds):
    """The main thread is somewhere else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)


@pytest.fixture
def ignored():
    before = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_does_not_act_on_a_signal_is_ended(number, ended, ignored):
    busy(1.5)
    assert not ended  # no signal
    began = time.monotonic()
    signal.raise_signal(number)
    busy(2)
    ((which, when),) = ended
    assert which == number and 1 <= when - began < 1.9


def test_what_acts_in_time_is_not_ended(monkeypatch):
    monkeypatch.setattr(signals, "ACT_SECONDS", 0.5)
    ended = []
    with pytest.raises(KeyboardInterrupt), ended_in_time(ended.append):
        signal.raise_signal(signal.SIGTERM)
    busy(1)
    assert not ended and signal.set_wakeup_fd(-1) == -1


def test_a_step_has_longer(ended, ignored, capfd):
    began = time.monotonic()
    with hold_signals(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        busy(1.5)
        assert not ended
        busy(1)
    assert len(ended) == 1 and 2 <= ended[0][1] - began
    assert "the step under way is saved if it ends within 2 s" in capfd.readouterr().err


def test_the_time_of_a_step_can_be_set(ended, ignored, monkeypatch):
    monkeypatch.setenv("AGFSYNC_STOP_SECONDS", "0.3")
    with hold_signals(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        busy(0.8)
        assert len(ended) == 1


def test_a_person_who_interrupts_a_step_presses_twice(ended, ignored):
    with hold_signals(signal.SIGINT):
        signal.raise_signal(signal.SIGINT)
        busy(2.5)
        assert not ended


def test_a_save_is_not_cut_off(ended, ignored):
    with hold_signals(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
        with unhurried():
            busy(2.5)
        assert not ended
