"""The watchdog against starvation names the policy."""

from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler


def only_a(step):
    step.continue_running()
    for request in step.waiting:
        if request.id == "a":
            step.schedule(request)


def harness(plan, timeout=0.1) -> EngineHarness:
    return EngineHarness(ScriptedScheduler(plan), limits=SchedulerLimits(starvation_timeout_s=timeout))


def add_two(engine):
    """`b` came first; `a` is the one that runs."""
    engine.add([2], id="b", max_tokens=1)
    engine.clock.advance(0.001)
    engine.add([1], id="a", max_tokens=60)


def test_a_request_left_behind_while_others_run_names_the_policy():
    engine = harness(only_a)
    add_two(engine)
    for _ in range(8):
        engine.step()
    assert engine.core.degraded is None
    for _ in range(8):
        engine.step()
    assert "scheduler 'scriptedscheduler' starves 1 request(s): 'b'" in engine.core.degraded
    assert "scheduler.starvation_timeout_s = 0.1" in engine.core.degraded


def test_a_running_request_can_starve_too():
    turns = []

    def plan(step):
        turns.append(1)
        for request in (*step.running, *step.waiting):
            if request.id == "a" or len(turns) == 1:
                step.schedule(request)

    engine = harness(plan)
    engine.add([1], id="a", max_tokens=40)
    engine.add([2], id="b", max_tokens=5)
    for _ in range(16):
        engine.step()
    assert "'b'" in engine.core.degraded


def test_it_recovers_with_the_request():
    turns = []

    def plan(step):
        turns.append(1)
        step.continue_running()
        for request in step.waiting:
            if request.id == "a" or len(turns) > 20:
                step.schedule(request)

    engine = harness(plan)
    add_two(engine)
    for _ in range(18):
        engine.step()
    assert engine.core.degraded is not None
    engine.run()
    assert engine.core.degraded is None


def test_waiting_within_the_timeout_is_no_starvation():
    engine = harness(only_a, timeout=60.0)
    engine.add([1], id="a", max_tokens=40)
    engine.add([2], id="b", max_tokens=1)
    for _ in range(30):
        engine.step()
    assert engine.core.degraded is None


def test_a_long_queue_that_moves_in_order_is_load_and_no_starvation():
    engine = EngineHarness(
        Fcfs(Fcfs.Options()), limits=SchedulerLimits(starvation_timeout_s=0.1, max_num_seqs=1), num_blocks=64
    )
    for index in range(4):
        engine.add([index], id=f"r{index}", max_tokens=30)
        engine.clock.advance(0.001)
    while engine.core.has_work:
        engine.step()
        assert engine.core.degraded is None
    assert engine.records["r3"].first_scheduled > 0.5


def test_a_blocked_request_does_not_starve():
    engine = harness(only_a)
    engine.add([1], id="a", max_tokens=40)
    engine.add([2], id="b", max_tokens=1, blocked_on=("grammar",))
    for _ in range(30):
        engine.step()
    assert engine.core.degraded is None


def test_a_policy_that_only_asks_to_be_woken_is_named_although_no_step_is_made():
    engine = harness(lambda step: step.wake_at(step.now + 0.01))
    engine.add([1], id="a")
    for _ in range(40):
        assert engine.plan() is None
        engine.clock.advance(0.01)
    assert "starves 1 request(s): 'a'" in engine.core.degraded
