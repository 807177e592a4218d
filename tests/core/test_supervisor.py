"""When a dead engine is started again, when no longer, and what is said meanwhile; the engines are scripted."""

import threading
import time

import pytest

from interlace.clock import VirtualClock
from interlace.engine.client import EngineClient, EngineHealth
from interlace.engine.supervisor import Supervisor
from interlace.errors import EngineDeadError, EngineRestartingError, EngineSilentError
from interlace.interfaces.executor import ExecutorInfo
from interlace.kv.specs import KVCacheConfig


class Engine(EngineClient):
    """One engine, which dies when told to. `start_error`: it cannot even start. `gate`: it waits for that to start."""

    def __init__(self, number, start_error=None, gate=None, stillborn=False):
        self.number, self.start_error, self.gate, self.stillborn = number, start_error, gate, stillborn
        self.dead = None
        self.silent = self.closed = False
        self.added = []

    def start(self, on_output, on_death, on_event=None):
        self.on_output, self.on_death = on_output, on_death
        if self.gate is not None:
            self.gate.wait(10)
        if self.start_error is not None:
            raise self.start_error
        if self.stillborn:
            self.die()
        kv = KVCacheConfig(block_size=4, num_blocks=8 + self.number, groups=(), bytes_per_block=1)
        return ExecutorInfo(kv=kv)

    def die(self, cause=None):
        self.dead = EngineDeadError(f"engine {self.number} died")
        self.dead.__cause__ = cause
        self.on_death(self.dead)

    def check(self):
        if self.dead is not None:
            raise self.dead

    def add(self, requests):
        self.check()
        self.added += requests

    def abort(self, request_ids):
        self.check()

    def health(self, timeout=5.0):
        self.check()
        if self.silent:
            raise EngineSilentError("no answer")
        return EngineHealth(status="ok", steps=self.number)

    def control(self, operation, **arguments):
        self.check()
        return self.number

    def shutdown(self):
        self.closed = True


class Bench:
    """A supervisor over engines that the test describes, and what it said."""

    def __init__(self, engines=None, max_restarts=3, window=60.0):
        self.made, self.deaths, self.infos = [], [], []
        self.clock = VirtualClock()
        self.describe = engines or {}
        self.supervisor = Supervisor(self.make, self.clock, max_restarts, window)
        self.supervisor.on_restart = self.infos.append

    def make(self):
        number = len(self.made) + 1
        self.made.append(Engine(number, **self.describe.get(number, {})))
        return self.made[-1]

    def __enter__(self):
        self.supervisor.start(lambda output: None, self.deaths.append)
        return self

    def __exit__(self, *error):
        self.supervisor.shutdown()
        assert not [thread for thread in threading.enumerate() if thread.name == "interlace-supervisor"]

    @property
    def status(self):
        return self.supervisor.health().status

    def wait(self, status, timeout=10.0):
        deadline = time.monotonic() + timeout
        while self.status != status:
            assert time.monotonic() < deadline, self.supervisor.health()
            time.sleep(0.005)


def test_a_dead_engine_is_replaced_and_the_new_one_takes_the_requests():
    with Bench() as bench:
        bench.supervisor.add(["a"])
        bench.made[0].die(ValueError("out of pages"))
        bench.wait("ok")
        bench.supervisor.add(["b"])
        assert (bench.made[0].added, bench.made[1].added) == (["a"], ["b"])
        assert bench.made[0].closed
        [death] = bench.deaths
        assert type(death) is EngineRestartingError and isinstance(death.__cause__, ValueError)
        assert str(death) == "engine 1 died; a new engine is being started"
        assert [info.kv.num_blocks for info in bench.infos] == [10]
        health = bench.supervisor.health()
        assert (health.restarts, health.last_cause, health.steps) == (1, "engine 1 died", 2)


def test_while_it_starts_everything_is_refused_with_a_time_to_come_back():
    gate = threading.Event()
    with Bench({2: {"gate": gate}}) as bench:
        bench.made[0].die()
        assert bench.status == "restarting"
        for use in (
            lambda: bench.supervisor.add(["b"]),
            lambda: bench.supervisor.abort(["a"]),
            lambda: bench.supervisor.control("echo"),
        ):
            with pytest.raises(EngineRestartingError, match="engine 1 died") as caught:
                use()
            assert caught.value.retry_after >= 1.0
        health = bench.supervisor.health()
        assert (health.restarts, health.last_cause) == (0, "engine 1 died")
        gate.set()
        bench.wait("ok")
        assert bench.supervisor.control("echo") == 2


@pytest.mark.parametrize("max_restarts", [3, 0])
def test_who_finds_it_dead_before_it_is_told_is_answered_alike(max_restarts):
    with Bench(max_restarts=max_restarts) as bench:
        bench.made[0].dead = EngineDeadError("engine 1 died")
        for use in (lambda: bench.supervisor.add(["b"]), lambda: bench.supervisor.control("echo")):
            with pytest.raises(EngineDeadError, match="engine 1 died") as caught:
                use()
            assert isinstance(caught.value, EngineRestartingError) == (max_restarts > 0)


def test_the_time_to_come_back_is_what_the_last_start_took():
    bench = Bench()
    make = bench.supervisor._make

    def slow():
        engine = make()
        start = engine.start
        engine.start = lambda *arguments: (bench.clock.advance(7.0), start(*arguments))[1]
        return engine

    bench.supervisor._make = slow
    with bench:
        bench.made[0].die()
        assert bench.deaths[0].retry_after == 7.0
        bench.wait("ok")


def test_an_engine_that_dies_again_and_again_stays_dead():
    with Bench(max_restarts=2) as bench:
        for number in range(3):
            bench.wait("ok")
            bench.made[number].die(RuntimeError(f"cause {number}"))
        assert bench.status == "dead"
        assert [type(death) for death in bench.deaths] == [EngineRestartingError] * 2 + [EngineDeadError]
        assert "failure 3 within 60 s (engine.max_restarts = 2)" in str(bench.deaths[-1])
        with pytest.raises(EngineDeadError, match="engine 3 died; it is not started again") as caught:
            bench.supervisor.add(["a"])
        assert str(caught.value.__cause__) == "cause 2"
        assert bench.supervisor.health().restarts == 2
    assert len(bench.made) == 3 and all(engine.closed for engine in bench.made)


def test_no_restarts_allowed_means_none():
    with Bench(max_restarts=0) as bench:
        bench.made[0].die()
        assert bench.status == "dead" and type(bench.deaths[0]) is EngineDeadError
    assert len(bench.made) == 1


def test_deaths_long_ago_do_not_count():
    with Bench(max_restarts=1, window=60.0) as bench:
        for number in range(4):
            bench.wait("ok")
            bench.made[number].die()
            bench.clock.advance(61.0)
        bench.wait("ok")
        assert bench.supervisor.health().restarts == 4


def test_a_new_engine_that_cannot_start_counts_as_a_death(caplog):
    failing = {"start_error": MemoryError("no memory for the weights")}
    with Bench({2: failing, 3: failing}, max_restarts=2) as bench:
        bench.made[0].die()
        bench.wait("dead")
        assert [type(death) for death in bench.deaths] == [EngineRestartingError, EngineDeadError]
        assert isinstance(bench.deaths[-1].__cause__, MemoryError)
        assert "MemoryError: no memory for the weights" in caplog.text and "Traceback" in caplog.text
        assert "no memory for the weights" in bench.supervisor.health().last_cause
    assert all(engine.closed for engine in bench.made)


def test_it_tries_again_after_a_start_that_failed():
    with Bench({2: {"start_error": OSError("a moment")}}) as bench:
        bench.made[0].die()
        bench.wait("ok")
        assert bench.supervisor.control("echo") == 3
        assert len(bench.deaths) == 1


def test_an_engine_that_dies_as_soon_as_it_is_ready_takes_no_requests():
    with Bench({1: {"stillborn": True}, 2: {"stillborn": True}}) as bench:
        bench.wait("ok")
        assert [str(death)[:8] for death in bench.deaths] == ["engine 1", "engine 2"]
        assert bench.supervisor.control("echo") == 3


def test_the_first_start_raises_its_own_cause():
    bench = Bench({1: {"start_error": OSError("no such disk")}})
    with pytest.raises(OSError, match="no such disk"):
        bench.supervisor.start(lambda output: None, bench.deaths.append)
    assert bench.deaths == [] and bench.made[0].closed
    bench.supervisor.shutdown()


def test_a_silent_engine_is_degraded_and_not_dead():
    with Bench() as bench:
        bench.made[0].silent = True
        health = bench.supervisor.health()
        assert (health.status, health.reason) == ("degraded", "no answer")


def test_shutdown_during_a_restart_ends_it():
    gate = threading.Event()
    bench = Bench({2: {"gate": gate}})
    with bench:
        bench.made[0].die()
        while len(bench.made) < 2:
            time.sleep(0.005)
        closer = threading.Thread(target=bench.supervisor.shutdown)
        closer.start()
        gate.set()
        closer.join(10)
        assert not closer.is_alive()
    assert bench.made[1].closed
    with pytest.raises(EngineDeadError, match="shut down"):
        bench.supervisor.add(["a"])


def test_shutdown_does_not_wait_for_a_pause_between_starts():
    bench = Bench()
    bench.supervisor._delay = lambda: 3600.0
    with bench:
        bench.made[0].die()
        while not bench.made[0].closed:  # cleared away before the pause
            time.sleep(0.005)
    assert len(bench.made) == 1


def test_nothing_can_be_asked_before_the_start():
    with pytest.raises(EngineDeadError, match="not started"):
        Bench().supervisor.add(["a"])
