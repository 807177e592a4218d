"""`EngineLoop`: waits when there is nothing to do, and keeps as many steps under way as the executor takes."""

import threading
import time

import pytest

from interlace.clock import MonotonicClock
from interlace.engine.core import EngineCore
from interlace.engine.loop import Abort, Add, Control, EngineLoop, Stop
from interlace.errors import InterlaceError
from interlace.interfaces.executor import ExecutorEvent
from interlace.messages import EngineRequest, SamplingParams
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.checked_worker import generate_alone
from interlace.testing.executor import ScriptedExecutor, scripted_spec
from interlace.testing.harness import ScriptedScheduler

MAX_MODEL_LEN = 256


def request(id="r", max_tokens=5, **fields) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens)
    values = {"prompt_token_ids": [1, 2, 3], "arrival_time": 0.0, "seed": 0} | fields
    return EngineRequest(id=id, params=params, **values)


class Running:
    """A loop on a thread; collects what it says."""

    def __init__(self, scheduler=None, limits=None, **options):
        self.executor = ScriptedExecutor(ScriptedExecutor.Options(**options))
        limits = limits or SchedulerLimits()
        spec = scripted_spec("nowhere:x", limits=limits, max_model_len=MAX_MODEL_LEN)
        info = self.executor.start(spec, lambda event: None)
        scheduler = scheduler or Fcfs(Fcfs.Options())
        self.core = EngineCore(scheduler, "policy", limits, info, max_model_len=MAX_MODEL_LEN)
        self.outputs, self.replies, self.death = [], {}, None
        self.changed = threading.Condition()
        self.loop = EngineLoop(self.core, self.executor, MonotonicClock(), self._on_output, self._on_reply)
        self.thread = threading.Thread(target=self._run)

    def _on_output(self, output):
        with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()

    def _on_reply(self, call_id, value, error):
        with self.changed:
            self.replies[call_id] = (value, error)
            self.changed.notify_all()

    def _run(self):
        try:
            self.loop.run()
        except BaseException as error:
            self.death = error
        with self.changed:
            self.changed.notify_all()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.loop.post(Stop())
        self.thread.join(10)
        self.executor.shutdown()
        assert not self.thread.is_alive()

    def wait(self, condition, timeout=10.0):
        with self.changed:
            assert self.changed.wait_for(condition, timeout), "it did not happen"

    @property
    def finished(self):
        return {name: info for output in self.outputs for name, info in output.finished.items()}

    def tokens(self, name):
        found = []
        for output in self.outputs:
            start = 0
            for other, count in zip(output.request_ids, output.counts, strict=True):
                found += output.token_ids[start : start + count] if other == name else []
                start += count
        return found

    def call(self, operation, **arguments):
        self.loop.post(Control(77, operation, arguments))
        self.replies.pop(77, None)
        self.wait(lambda: 77 in self.replies)
        value, error = self.replies[77]
        if error is not None:
            raise error
        return value


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("delay_s", [0.0, 0.002], ids=["inline", "delayed"])
def test_requests_run_to_their_end(max_in_flight, delay_s):
    with Running(max_in_flight=max_in_flight, delay_s=delay_s) as running:
        requests = [request(f"r{index}", 10, seed=index) for index in range(5)]
        running.loop.post(Add(requests))
        running.wait(lambda: len(running.finished) == 5)
        for one in requests:
            expected, reason = generate_alone(one, running.executor.next_token, MAX_MODEL_LEN)
            assert (running.tokens(one.id), running.finished[one.id].reason) == (expected, reason)


def test_steps_overlap_as_far_as_the_executor_takes_them():
    class Watched(ScriptedExecutor):
        most = 0

        def submit(self, plan):
            future = super().submit(plan)
            Watched.most = max(Watched.most, len(self._queue))
            return future

    with Running(max_in_flight=3, delay_s=0.002) as running:
        running.executor.__class__ = Watched
        running.loop.post(Add([request(max_tokens=20)]))
        running.wait(lambda: running.finished)
    assert Watched.most == 3


def test_an_abort_is_carried_out_between_steps():
    with Running(delay_s=0.01) as running:
        running.loop.post(Add([request("a", 200), request("b", 3)]))
        running.wait(lambda: running.tokens("a"))
        running.loop.post(Abort(["a", "nobody"]))
        running.wait(lambda: "a" in running.finished)
        assert running.finished["a"].reason == "abort"
        running.wait(lambda: "b" in running.finished)


def test_an_abort_without_a_step_reaches_the_front():
    with Running(ScriptedScheduler(lambda step: step.wake_at(step.now + 100))) as running:
        running.loop.post(Add([request("a")]))
        running.loop.post(Abort(["a"]))
        running.wait(lambda: "a" in running.finished)


def test_a_deadline_passes_without_a_step():
    clock = MonotonicClock()
    with Running(ScriptedScheduler(lambda step: step.wake_at(step.now + 100))) as running:
        running.loop.post(Add([request("a", deadline=clock.now() + 0.05)]))
        running.wait(lambda: "a" in running.finished)
        assert running.finished["a"].error_code == "deadline"


@pytest.mark.parametrize("deadline", [float("inf"), 1e300], ids=["inf", "huge"])
def test_a_deadline_beyond_all_time_is_none(deadline):
    with Running(num_blocks=8) as running:
        running.loop.post(Add([request("a", deadline=deadline), request("b", deadline=deadline, blocked_on=("x",))]))
        running.wait(lambda: "a" in running.finished)
        assert running.call("health").status == "ok"
        assert running.finished["a"].reason == "length"


def test_a_duplicate_id_is_refused_and_the_first_goes_on(caplog):
    with Running(delay_s=0.002) as running:
        running.loop.post(Add([request("a"), request("a"), request("b")]))
        running.wait(lambda: len(running.finished) == 2)
    assert "already running; ids must be unique" in caplog.text


def test_a_failed_step_is_not_the_end(caplog):
    with Running(fail_steps=(2,)) as running:
        running.loop.post(Add([request("a", 9)]))
        running.wait(lambda: "a" in running.finished)
        assert running.finished["a"].error == "the step failed: RuntimeError: scripted failure of step 2"
        running.loop.post(Add([request("b")]))
        running.wait(lambda: "b" in running.finished)
        assert running.finished["b"].reason == "length"
    assert "a step failed; its requests end with an error" in caplog.text


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_a_failed_step_with_others_under_way(max_in_flight):
    with Running(fail_steps=(3,), max_in_flight=max_in_flight, delay_s=0.002) as running:
        running.loop.post(Add([request(f"r{index}", 12) for index in range(3)]))
        running.wait(lambda: len(running.finished) == 3)
        running.loop.post(Add([request("again")]))
        running.wait(lambda: "again" in running.finished)
        assert running.finished["again"].reason == "length"
        assert running.call("check_integrity") is None


def test_a_broken_executor_ends_the_loop_with_the_true_cause():
    with Running(fail_steps=(1,), healthy_after_failure=False) as running:
        running.loop.post(Add([request("a", 9)]))
        running.wait(lambda: running.death is not None)
        assert "a" not in running.finished, "it is told of the death, which carries the cause"
    assert isinstance(running.death, InterlaceError)
    assert "the executor cannot go on: the scripted executor is broken" in str(running.death)
    assert "scripted failure of step 1" in str(running.death.__cause__)


def test_a_worker_that_dies_while_nothing_runs_ends_the_loop():
    with Running() as running:
        running.loop.hear(ExecutorEvent("progress", "loading"))
        running.loop.hear(ExecutorEvent("worker_died", "worker 1 is gone"))
        assert running.call("health").status == "ok", "the executor can go on: so does the loop"
        running.executor._unhealthy = ValueError("the fan fell off")
        running.loop.hear(ExecutorEvent("worker_died", "worker 1 is gone"))
        running.wait(lambda: running.death is not None)
    assert "the executor cannot go on: the scripted executor is broken" in str(running.death)
    assert "the fan fell off" in str(running.death.__cause__.__cause__)


class TestControl:
    def test_health_is_answered_by_the_loop(self):
        with Running() as running:
            running.loop.post(Add([request("a", 3)]))
            running.wait(lambda: running.finished)
            health = running.call("health")
            assert (health.status, health.steps, health.num_running, health.num_waiting) == ("ok", 3, 0, 0)

    def test_health_is_degraded_with_a_reason(self):
        def fail(step):
            raise RuntimeError("a bad idea")

        with Running(ScriptedScheduler(fail)) as running:
            running.loop.post(Add([request("a", 12)]))
            running.wait(lambda: running.finished)
            health = running.call("health")
            assert health.status == "degraded"
            assert "a bad idea" in health.reason

    def test_an_unhealthy_executor_is_an_error(self):
        with Running() as running:
            running.executor._unhealthy = ValueError("the fan fell off")
            with pytest.raises(RuntimeError, match="broken"):
                running.call("health")
            running.executor._unhealthy = None

    def test_operations_of_the_engine_and_of_the_executor(self):
        with Running(num_blocks=9) as running:
            assert running.call("check_integrity") is None
            assert running.call("free_blocks") == 8
            assert running.call("reset_prefix_cache") is None
            assert running.call("echo", word="hello") == {"word": "hello"}
            running.loop.post(Add([request("a", blocked_on=("grammar",))]))
            assert running.call("unblock", request_id="a", name="grammar") is None
            running.wait(lambda: "a" in running.finished)

    def test_an_unknown_operation_names_itself_and_harms_nobody(self):
        with Running() as running:
            with pytest.raises(ValueError, match="offers no operation 'dance'"):
                running.call("dance")
            running.loop.post(Add([request("a")]))
            running.wait(lambda: "a" in running.finished)


def cpu_seconds(seconds: float) -> float:
    began = time.process_time()
    time.sleep(seconds)
    return time.process_time() - began


class TestIdle:
    def test_nothing_to_do_costs_nothing(self):
        with Running() as running:
            running.loop.post(Add([request("a")]))
            running.wait(lambda: running.finished)
            assert cpu_seconds(1.0) < 0.05

    @pytest.mark.parametrize(
        "plan",
        [lambda step: step.wake_at(step.now), lambda step: step.wake_at(step.now + 30), lambda step: step.wake_at(0.0)],
        ids=["now", "later", "past"],
    )
    def test_a_policy_that_holds_back_costs_little(self, plan):
        with Running(ScriptedScheduler(plan)) as running:
            running.loop.post(Add([request("a")]))
            time.sleep(0.1)
            assert cpu_seconds(0.5) < 0.1

    def test_work_that_cannot_run_costs_little(self):
        with Running(num_blocks=4) as running:
            running.core.kv.pool.pin(running.core.kv.pool.allocate(1)[0])
            running.core.kv.pool.num_pins += 1
            running.loop.post(Add([request("a", prompt_token_ids=list(range(12)))]))
            time.sleep(0.1)
            assert cpu_seconds(0.5) < 0.1

    def test_a_blocked_request_costs_nothing(self):
        with Running() as running:
            running.loop.post(Add([request("a", blocked_on=("grammar",))]))
            time.sleep(0.05)
            assert cpu_seconds(0.5) < 0.05
