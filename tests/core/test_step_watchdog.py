"""A loop that is stuck is noticed, described and given up, in a thread and in a child process."""

import os
import signal
import sys
import threading
import traceback

import msgspec
import pytest

from interlace.assemble import make_client
from interlace.clock import MonotonicClock, VirtualClock
from interlace.engine.step_watchdog import StepWatchdog
from interlace.errors import EngineDeadError
from interlace.messages import EngineRequest, SamplingParams
from interlace.testing.executor import scripted_spec

FCFS = "interlace.plugins.schedulers.fcfs:Fcfs"
FAULTY = "interlace_faulty_scheduler:Faulty"
BOTH = pytest.mark.parametrize("process", ["inline", "subprocess"])
TIMEOUT = 1.2


class Loop:
    beat, waiting = 0, False

    def hang_report(self):
        return "the state"


class Watched:
    """A watchdog over a loop that the test plays, at a pace set by the test's clock."""

    def __init__(self):
        self.loop, self.clock, self.hangs = Loop(), VirtualClock(), []
        self.hung, self.looked = threading.Event(), threading.Semaphore(0)
        self.watchdog = StepWatchdog(self.loop, self.clock, 8.0, self.on_hang)
        self.watchdog._stop = self

    def on_hang(self, error, report):
        self.hangs.append((error, report))
        self.hung.set()

    # In place of the event that paces the watchdog: one look per `look`.
    stopped = False

    def set(self):
        self.stopped = True
        self.looked.release()

    def wait(self, interval):
        assert interval == 1.0
        self.ready.release()
        self.looked.acquire()
        return self.stopped

    def __enter__(self):
        self.ready = threading.Semaphore(0)
        self.watchdog.__enter__()
        self.ready.acquire()
        return self

    def __exit__(self, *error):
        self.watchdog.__exit__(*error)

    def look(self, seconds=1.0):
        self.clock.advance(seconds)
        self.looked.release()
        while not self.ready.acquire(timeout=0.01):
            if self.hung.is_set():
                return


def test_a_loop_that_does_not_come_round_is_hung():
    with Watched() as watched:
        for _ in range(8):
            watched.look()
        assert watched.hangs == []
        watched.look()
        [(error, report)] = watched.hangs
        assert str(error) == ("the engine loop is stuck: a step has been running for 8.0 s (engine.step_timeout_s = 8)")
        assert report.startswith("the state\nthread MainThread:\n") and "test_step_watchdog.py" in report


def test_a_loop_that_comes_round_or_waits_is_not():
    with Watched() as watched:
        for _ in range(30):
            watched.loop.beat += 1
            watched.look()
        watched.loop.waiting = True
        for _ in range(30):
            watched.look()
        assert watched.hangs == []


def test_time_in_which_the_process_was_stopped_does_not_count():
    with Watched() as watched:
        watched.look()
        watched.look(3600.0)
        watched.look()
        assert watched.hangs == []


# ── whole engines ───────────────────────────────────────────────────────────────────────────────────────────────


def request(id="a", **labels) -> EngineRequest:
    params = SamplingParams(max_tokens=20)
    return EngineRequest(id=id, prompt_token_ids=[1, 2, 3], params=params, arrival_time=0.0, seed=0, labels=labels)


class Engine:
    def __init__(self, process, scheduler=FCFS, **options):
        spec = msgspec.structs.replace(scripted_spec(scheduler, **options), step_timeout_s=TIMEOUT)
        self.client = make_client(spec, process, MonotonicClock())
        self.death, self.deaths, self.outputs = threading.Event(), [], []

    def on_death(self, error):
        self.deaths.append(error)
        self.death.set()

    def __enter__(self):
        self.client.start(self.outputs.append, self.on_death)
        return self

    def __exit__(self, *error):
        self.client.shutdown()

    def story(self):
        """What the death says, causes included."""
        assert self.death.wait(20.0), "nobody noticed"
        [death] = self.deaths
        assert isinstance(death, EngineDeadError)
        return "".join(traceback.format_exception(death))


@pytest.fixture
def faulty(install, monkeypatch):
    (folder,) = install("faulty")
    monkeypatch.setenv("PYTHONPATH", folder)
    yield
    for name in [name for name in sys.modules if name.startswith("interlace_faulty")]:
        del sys.modules[name]


@BOTH
class TestHungStep:
    def test_a_policy_that_never_returns(self, process, faulty, caplog):
        with Engine(process, FAULTY) as engine:
            engine.client.add([request(), request("b", fault="hang", after="4")])
            story = engine.story() + caplog.text
            assert "the engine loop is stuck: a step has been running for" in story
            assert "(engine.step_timeout_s = 1.2)" in story
            assert "running: 2\n  a: prompt 3, computed 6, output 4 of 20 tokens" in story
            assert "KV cache: 4 of 63 blocks held" in story
            assert "interlace_faulty_scheduler.py" in story and "in do" in story, "the stack leads to the culprit"
            for use in (engine.client.health, lambda: engine.client.add([request("c")])):
                with pytest.raises(EngineDeadError, match="the engine loop is stuck"):
                    use()

    def test_an_executor_that_never_answers(self, process, caplog):
        with Engine(process, manual=True) as engine:
            engine.client.add([request()])
            story = engine.story() + caplog.text
            assert "0 steps completed, 1 under way\n  step 0: 1 rows, 3 tokens, 1 admitted, 0 preempted" in story
            assert "in _complete_step" in story

    def test_a_busy_and_an_idle_engine_are_not_hung(self, process):
        with Engine(process, delay_s=0.05) as engine:
            engine.client.add([request()])
            while not any(output.finished for output in list(engine.outputs)):
                assert not engine.death.wait(0.05)
            assert not engine.death.wait(1.5 * TIMEOUT)
            assert engine.client.health().status == "ok"


def test_a_hung_child_ends_with_a_status_of_its_own(faulty):
    with Engine("subprocess", FAULTY) as engine:
        engine.client.add([request(fault="hang")])
        engine.story()
        assert engine.client.returncode == 70


@pytest.mark.slow
def test_a_frozen_child_is_ended_by_its_parent(faulty):
    """Its own watchdog stands still with it."""
    with Engine("subprocess", FAULTY) as engine:
        engine.client.add([request(fault="freeze", after="3")])
        assert "TimeoutError: it answered nothing for 1.2 s (engine.step_timeout_s) and was ended" in engine.story()
        assert engine.client.returncode in (-signal.SIGABRT, -signal.SIGKILL)


@pytest.mark.slow
def test_a_child_that_was_stopped_for_a_moment_goes_on():
    with Engine("subprocess", delay_s=0.01) as engine:
        engine.client.add([request()])
        os.kill(engine.client.pid, signal.SIGSTOP)
        assert not engine.death.wait(TIMEOUT)
        os.kill(engine.client.pid, signal.SIGCONT)
        while not any(output.finished for output in list(engine.outputs)):
            assert not engine.death.wait(0.05)


def test_a_loop_given_up_ends_without_a_word_should_it_go_on_after_all():
    with Engine("inline", manual=True) as engine:
        engine.client.add([request()])
        engine.story()
        thread = engine.client._thread
        engine.client._loop._executor.run_next()
        thread.join(10)
        assert not thread.is_alive() and engine.outputs == [] and len(engine.deaths) == 1


@pytest.mark.slow
def test_a_crash_in_native_code_leaves_the_python_stack(faulty, capfd):
    with Engine("subprocess", FAULTY) as engine:
        engine.client.add([request(fault="segfault")])
        assert "was killed by signal 11 without a word" in engine.story()
    err = capfd.readouterr().err
    assert "Fatal Python error: Segmentation fault" in err and "interlace_faulty_scheduler.py" in err


def test_the_threads_of_inline_engines_are_gone_but_for_stuck_ones():
    before = set(threading.enumerate())
    with Engine("inline") as engine:
        engine.client.add([request()])
        assert [thread.name for thread in set(threading.enumerate()) - before].count("interlace-watchdog") == 1
    assert set(threading.enumerate()) == before
