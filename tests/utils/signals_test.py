import signal
import threading

import pytest

from agfsync_jax.utils.signals import hold_signals


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
