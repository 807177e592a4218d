"""`GuardedPolicy`: a policy that fails costs speed or fairness, and is named."""

import logging

import pytest

from interlace.scheduling.fallback import MAX_FAILURES, MAX_PREEMPTIONS
from interlace.spec import SchedulerLimits
from interlace.testing.adversaries import ADVERSARIES
from interlace.testing.harness import EngineHarness, ScriptedScheduler

LIMITS = SchedulerLimits(watermark=0.0)


def fail(step):
    raise RuntimeError("a bad idea")


def nothing(step):
    return None


def everything(step):
    step.continue_running()
    for request in step.waiting:
        step.schedule(request)


def harness(plan, **options) -> EngineHarness:
    return EngineHarness(ScriptedScheduler(plan), limits=LIMITS, **options)


def guard(engine):
    return engine.core._policy


def test_a_policy_that_raises_keeps_its_valid_partial_plan():
    def plan(step):
        step.schedule(step.waiting[-1])
        fail(step)

    engine = harness(plan)
    for name in ("a", "b", "c"):
        engine.add([ord(name)], id=name)
        engine.clock.advance(1)
    engine.plan()
    order = sorted(engine.core.queues.running, key=lambda state: engine.plans[0].slots.index(state.slot))
    assert [state.id for state in order] == ["c", "a", "b"], "its own choice first, then the rest by arrival"


def test_the_error_of_the_policy_is_logged_with_its_name_and_traceback(caplog):
    engine = harness(fail)
    engine.add([1])
    engine.plan()
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "scheduler 'scriptedscheduler' failed a step: RuntimeError: a bad idea" in record.message
    assert record.exc_info is not None


def test_too_many_calls_are_a_failure():
    def plan(step):
        while True:
            step.schedule(step.waiting[0] if step.waiting else step.running[0])

    engine = harness(plan)
    engine.add([1], id="a")
    engine.add([2], id="b")
    assert len(engine.plan().slots) == 2
    assert guard(engine).failures == 1


def test_planning_nothing_although_something_could_run_is_a_failure():
    engine = harness(nothing)
    engine.add([1])
    assert engine.plan() is not None
    assert guard(engine).failures == 1


def test_planning_nothing_while_steps_are_under_way_is_patience():
    turns = []

    def plan(step):
        turns.append(1)
        if len(turns) == 1:
            everything(step)

    engine = harness(plan, max_in_flight=2)
    engine.add([1])
    engine.plan()
    assert engine.plan() is None
    assert guard(engine).failures == 0


def test_planning_nothing_with_a_time_to_wake_is_holding_back():
    engine = harness(lambda step: step.wake_at(step.now + 5) if step.now < 5 else everything(step))
    engine.add([1], id="a", max_tokens=2)
    assert engine.plan() is None
    assert guard(engine).failures == 0
    assert engine.core.next_wakeup() == 5.0
    engine.run()
    assert engine.records["a"].first_scheduled >= 5.0


def test_planning_nothing_when_nothing_can_run_is_no_failure():
    engine = harness(nothing, num_blocks=4)
    [block] = engine.core.kv.pool.allocate(1)
    engine.core.kv.pool.num_pins += 1
    engine.add(range(9), id="a")
    assert engine.plan() is None
    assert guard(engine).failures == 0
    engine.core.kv.pool.unpin(block)
    assert engine.plan() is not None


def test_a_good_step_forgives_the_bad_ones_before():
    turns = []

    def plan(step):
        turns.append(1)
        if len(turns) % MAX_FAILURES:
            fail(step)
        everything(step)

    engine = harness(plan)
    engine.add([1], max_tokens=50)
    engine.run()
    assert engine.core.degraded is None


def test_after_ten_failures_in_a_row_the_fallback_stays_and_health_says_so():
    calls = []

    def plan(step):
        calls.append(1)
        fail(step)

    engine = harness(plan)
    engine.add([1], max_tokens=30)
    for _ in range(MAX_FAILURES - 1):
        engine.step()
    assert engine.core.degraded is None
    engine.step()
    assert "scheduler 'scriptedscheduler' was replaced by the fallback" in engine.core.degraded
    assert "failed 10 steps in a row: RuntimeError: a bad idea" in engine.core.degraded
    engine.run()
    assert len(calls) == MAX_FAILURES == 10


def test_the_degraded_state_reaches_the_front_with_every_step():
    engine = harness(fail)
    engine.add([1], max_tokens=MAX_FAILURES + 2)
    outputs = [engine.step() for _ in range(MAX_FAILURES + 1)]
    assert outputs[0].stats.degraded is None
    assert outputs[-1].stats.degraded == engine.core.degraded is not None


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_policy_that_takes_back_whatever_it_starts_is_replaced(max_in_flight):
    turns = []

    def plan(step):
        turns.append(1)
        if len(turns) % 2:
            everything(step)
        for request in () if len(turns) % 2 else step.running:
            step.preempt(request)

    engine = harness(plan, max_in_flight=max_in_flight, prefix_caching=False)
    engine.limits = engine.core.limits = SchedulerLimits(max_num_batched_tokens=4)
    engine.add(range(20), id="a", max_tokens=3)  # never gets beyond its first chunk
    engine.run()
    assert engine.records["a"].reason == "length"
    assert f"it preempted {MAX_PREEMPTIONS * 17 + 1} times and no request gained a token" in engine.core.degraded


def test_preempting_with_progress_is_the_policys_business():
    turns = []

    def plan(step):
        turns.append(1)
        if len(turns) % 2:
            everything(step)
        for request in () if len(turns) % 2 else step.running:
            step.preempt(request)

    engine = harness(plan)
    engine.add([1], max_tokens=200)
    engine.run()
    assert engine.core.degraded is None


class TestTheFallbackItself:
    def test_it_runs_in_arrival_order_without_preempting(self):
        engine = harness(fail, num_blocks=9)
        for name in "abc":
            engine.add([ord(name)] * 12, id=name, max_tokens=4)
            engine.clock.advance(1)
        engine.run()
        assert [engine.records[name].first_step for name in "abc"] == sorted(
            engine.records[name].first_step for name in "abc"
        )
        assert sum(record.finish.num_preemptions for record in engine.records.values()) == 0

    def test_it_preempts_the_youngest_when_nothing_else_would_ever_free_a_block(self):
        engine = harness(fail, num_blocks=5)
        engine.add(range(8), id="old", max_tokens=6)
        engine.clock.advance(1)
        engine.add(range(20, 28), id="young", max_tokens=6)
        engine.run()
        assert engine.records["old"].finish.num_preemptions == 0
        assert engine.records["young"].finish.num_preemptions >= 1

    def test_among_equals_the_last_one_admitted_gives_way(self):
        engine = harness(fail, num_blocks=5)
        engine.add(range(8), id="first", max_tokens=6)
        engine.add(range(20, 28), id="second", max_tokens=6)
        engine.run()
        assert engine.records["first"].finish.num_preemptions == 0


@pytest.mark.parametrize("name", ADVERSARIES)
def test_no_adversary_stops_a_request(name, caplog):
    caplog.set_level(logging.CRITICAL)
    policy = ADVERSARIES[name](3)
    engine = EngineHarness(policy, limits=LIMITS, num_blocks=12)
    for index in range(6):
        engine.add(range(index, index + 10), id=f"r{index}", max_tokens=6)
    engine.run()
    allowed = {"length", "error"} if policy.rejects else {"length"}
    assert {record.reason for record in engine.records.values()} <= allowed
