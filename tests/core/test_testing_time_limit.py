"""`time_limit` ends what hangs, and leaves the alarm to whoever had it."""

from __future__ import annotations

import signal
import threading

import pytest

from interlace.testing.time_limit import OutOfTimeError, time_limit


@pytest.fixture(autouse=True)
def no_alarm_is_left():
    handler, (timer, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    yield
    assert signal.getsignal(signal.SIGALRM) is handler
    assert bool(signal.getitimer(signal.ITIMER_REAL)[0]) == bool(timer)


def test_waiting_is_ended():
    with pytest.raises(OutOfTimeError, match=r"the wait has not ended after 0\.05 s"), time_limit(0.05, "the wait"):
        threading.Event().wait(30)


def test_looping_is_ended():
    with pytest.raises(OutOfTimeError), time_limit(0.05, "the loop"):
        while True:
            pass


def test_nothing_forgives_it():
    def forgive():
        while True:
            try:
                threading.Event().wait(30)
            except Exception:
                continue

    with pytest.raises(OutOfTimeError), time_limit(0.05, "the loop"):
        forgive()


def test_in_time():
    with time_limit(30, "nothing"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_the_outer_limit_goes_on():
    with pytest.raises(OutOfTimeError, match="the whole"), time_limit(0.1, "the whole"):
        while True:
            with time_limit(30, "a part"):
                pass


def test_an_inner_limit_hides_the_outer_one_until_it_is_over():
    with pytest.raises(OutOfTimeError, match="the whole"), time_limit(0.05, "the whole"):
        with time_limit(0.15, "a part"), pytest.raises(OutOfTimeError, match="a part"):
            threading.Event().wait(30)
        threading.Event().wait(30)


def test_other_threads_are_left_alone():
    outcomes = []

    def run():
        with time_limit(0.01, "the thread"):
            outcomes.append(threading.Event().wait(0.05))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcomes == [False]
