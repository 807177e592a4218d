"""`StepBuilder`: preempting, rejecting, looking; and what it makes of misuse."""

import math

import pytest

from interlace.interfaces.scheduler import Outcome
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.scheduling.step_builder import CALLS_PER_REQUEST, StaleBuilderError
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler


def schedule_all(step):
    """Running requests, then waiting ones; the outcome of each waiting one."""
    step.continue_running()
    return {request.id: step.schedule(request) for request in step.waiting}


def harness(plan=schedule_all, **options) -> EngineHarness:
    limits = {key: options.pop(key) for key in list(options) if key in SchedulerLimits.__struct_fields__}
    return EngineHarness(ScriptedScheduler(plan), limits=SchedulerLimits(**({"watermark": 0.0} | limits)), **options)


def outcomes(engine) -> dict:
    """Plan one step; what `schedule_all` returned."""
    engine.plan()
    return engine.core._policy.policy.log[-1]


class TestPreempt:
    def test_it_gives_back_seat_and_blocks_and_says_how_many(self):
        freed = []
        engine = harness(lambda step: freed.extend(step.preempt(r) for r in step.running) or schedule_all(step))
        engine.add(range(9), id="a")
        engine.step()
        engine.plan()
        assert freed == [3]
        assert engine.core.kv.pool.num_free == engine.core.kv.pool.num_usable

    def test_it_is_not_schedulable_again_in_the_same_step(self):
        def plan(step):
            if not step.running:
                return schedule_all(step)
            [request] = step.running
            step.preempt(request)
            return step.schedule(request), list(step.waiting), step.fits(request)

        engine = harness(plan)
        engine.add(range(9), id="a")
        engine.step()
        engine.plan()
        assert engine.core._policy.policy.log[-1] == (Outcome.NOT_READY, [], False)

    def test_it_undoes_the_place_in_this_step(self):
        def plan(step):
            schedule_all(step)
            before = step.token_budget_left
            freed = step.preempt(step.running[-1])
            return freed, step.token_budget_left - before

        engine = harness(plan)
        engine.add(range(4), id="a")
        engine.add(range(20, 29), id="b")
        plan = engine.plan()
        assert engine.core._policy.policy.log == [(3, 9)]
        assert (plan.num_tokens, len(plan.admitted)) == ([4], 1)
        assert plan.preempted == [], "no worker has heard of it"
        assert engine.state("b").num_preemptions == 0

    def test_a_waiting_request_cannot_be_preempted(self):
        engine = harness(lambda step: [step.preempt(request) for request in step.waiting])
        engine.add([1], id="a")
        engine.core.plan(0.0)
        assert engine.core._policy.policy.log == [[0]]

    def test_it_resumes_with_equal_tokens(self):
        turns = iter(range(1000))

        def plan(step):
            if next(turns) % 5 == 4:
                for request in step.running:
                    step.preempt(request)
            return schedule_all(step)

        engine = harness(plan, prefix_caching=False)
        engine.add(range(9), id="a", max_tokens=20)
        tokens = engine.run()["a"]
        assert engine.records["a"].finish.num_preemptions >= 3
        assert tokens == engine.expected("a")[0]


class TestReject:
    def test_it_ends_a_request_with_the_reason(self):
        engine = harness(lambda step: [step.reject(request, "not today") for request in step.waiting])
        engine.add([1], id="a")
        assert engine.plan() is None
        record = engine.records["a"]
        assert record.error_code == "rejected"
        assert record.finish.error == "rejected by the scheduling policy: not today"
        engine.check_end()

    def test_a_request_admitted_in_this_step_leaves_no_trace(self):
        def plan(step):
            schedule_all(step)
            step.reject(step.running[0], "second thoughts")

        engine = harness(plan)
        engine.add(range(8), id="a")
        engine.add(range(40, 48), id="b", max_tokens=1)
        plan = engine.plan()
        assert len(plan.admitted) == len(plan.slots) == 1
        assert plan.finished == []
        assert engine.core.queues.released == []

    def test_a_running_request_is_released_on_the_worker(self):
        engine = harness(
            lambda step: [step.reject(r, "enough") for r in step.running] if step.running else schedule_all(step)
        )
        engine.add(range(8), id="a")
        engine.step()
        assert engine.plan() is None
        engine.check_end()

    def test_the_policy_hears_of_it_after_its_plan(self):
        heard = []

        class Rejects(Fcfs):
            def plan(self, step):
                for request in step.waiting:
                    step.reject(request, "no")
                heard.append("plan ends")

            def on_finish(self, request, now):
                heard.append(request.id)

        engine = EngineHarness(Rejects(Rejects.Options()))
        engine.add([1], id="a")
        engine.plan()
        assert heard == ["plan ends", "a"]


class TestLooking:
    def test_fits_says_what_schedule_would_do_and_changes_nothing(self):
        def plan(step):
            seen = []
            for request in (*step.running, *step.waiting):
                free = engine.core.kv.pool.num_free
                seen.append(step.fits(request))
                assert engine.core.kv.pool.num_free == free
                assert bool(step.schedule(request)) == seen[-1]
            return seen

        engine = harness(plan, num_blocks=7, max_num_batched_tokens=20)
        engine.add(range(8), id="a")
        engine.add(range(40, 60), id="too large for now")
        engine.add(range(60, 68), id="b")
        engine.add(range(70, 80), id="over budget")
        engine.plan()
        assert engine.core._policy.policy.log == [[True, False, True, False]]
        engine.complete()
        engine.plan()
        assert engine.core._policy.policy.log[-1][:2] == [True, True]

    def test_cached_tokens_tells_what_the_cache_holds_now(self):
        engine = harness(lambda step: {r.id: step.cached_tokens(r) for r in step.waiting} | {"all": schedule_all(step)})
        engine.add(range(9), id="a", max_tokens=1)
        engine.step()
        engine.add(range(9), id="again")
        engine.add(range(5, 14), id="other")
        log = outcomes(engine)
        assert (log["again"], log["other"]) == (8, 0)

    def test_snapshots_do_not_change_under_the_policy(self):
        def plan(step):
            waiting, running = step.waiting, step.running
            for request in waiting:
                step.schedule(request)
            return len(waiting), len(running), len(step.waiting), len(step.running)

        engine = harness(plan)
        engine.add([1])
        engine.add([2])
        engine.plan()
        assert engine.core._policy.policy.log == [(2, 0, 0, 2)]


class TestMisuse:
    def test_a_builder_is_of_no_use_after_its_step(self):
        kept = []
        engine = harness(lambda step: kept.append(step) or schedule_all(step))
        engine.add([1], id="a")
        engine.plan()
        uses = (
            lambda: kept[0].schedule(engine.state("a")),
            lambda: kept[0].preempt(engine.state("a")),
            lambda: kept[0].reject(engine.state("a"), "late"),
            lambda: kept[0].continue_running(),
            lambda: kept[0].running,
            lambda: kept[0].waiting,
            lambda: kept[0].fits(engine.state("a")),
            lambda: kept[0].cached_tokens(engine.state("a")),
            lambda: kept[0].wake_at(1.0),
        )
        for use in uses:
            with pytest.raises(StaleBuilderError, match="only during the `plan` call"):
                use()
        engine.run()

    @pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf])
    def test_times_that_never_come_are_refused(self, time):
        engine = harness(lambda step: step.wake_at(time))
        engine.add([1], id="a")
        engine.plan()
        assert engine.core._policy.failures == 1
        assert engine.core.next_wakeup() is None

    @pytest.mark.parametrize(
        "loop",
        [
            lambda step: [step.schedule(r) for r in (*step.running, *step.waiting)],
            lambda step: step.continue_running(),
            lambda step: list(step.waiting),
            lambda step: [step.preempt(r) for r in step.running],
            lambda step: [step.fits(r) for r in step.waiting],
        ],
        ids=["schedule", "continue_running", "waiting", "preempt", "fits"],
    )
    def test_a_loop_without_end_is_ended(self, loop):
        turns = []

        def plan(step):
            while True:
                turns.append(loop(step))

        engine = harness(plan)
        engine.add(range(8), id="a", max_tokens=3)
        engine.plan()
        assert len(turns) <= CALLS_PER_REQUEST * 17
        engine.run()
        assert engine.records["a"].reason == "length"

    def test_wake_at_takes_the_earliest(self):
        engine = harness(lambda step: [step.wake_at(time) for time in (3.0, 2.0, 5.0)])
        engine.add([1], id="a")
        assert engine.plan() is None
        assert engine.core.next_wakeup() == 2.0


def test_fcfs_is_as_good_as_the_interface_promises():
    """The example of the docs, on a mixed load in a cache that is far too small."""
    engine = EngineHarness(Fcfs(Fcfs.Options()), num_blocks=12, limits=SchedulerLimits(max_num_batched_tokens=16))
    for index in range(12):
        engine.add(range(index, index + 9), id=f"r{index}", max_tokens=15)
    engine.run()
    assert sum(record.finish.num_preemptions for record in engine.records.values()) > 0
    assert all(record.reason == "length" for record in engine.records.values())
