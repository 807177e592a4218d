"""`StepBuilder`: every guarantee of the mechanism, one test each."""

import math

import pytest

from interlace.interfaces.scheduler import Outcome
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.scheduling.step_builder import CALLS_PER_REQUEST, StaleBuilderError
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler

NO_WATERMARK = SchedulerLimits(watermark=0.0)


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


def rows(plan) -> list:
    return list(zip(plan.slots, plan.num_tokens, plan.sample, strict=True))


class TestAdmission:
    """`num_blocks` counts the null block; blocks hold four tokens."""

    def test_it_needs_blocks_for_the_whole_known_length(self):
        engine = harness(num_blocks=6, long_prefill_token_threshold=4)
        engine.add(range(17), id="fits")
        assert outcomes(engine) == {"fits": Outcome.OK}
        engine = harness(num_blocks=6, long_prefill_token_threshold=4)
        engine.add(range(4), id="first")
        engine.add(range(40, 57), id="long")
        assert outcomes(engine) == {"first": Outcome.OK, "long": Outcome.BLOCKS}

    def test_it_leaves_what_running_prefills_still_need(self):
        engine = harness(num_blocks=11, long_prefill_token_threshold=4)
        engine.add(range(24), id="a")  # one block now, five to come
        engine.add(range(40, 57), id="five")
        engine.add(range(60, 76), id="four")
        assert outcomes(engine) == {"a": Outcome.OK, "five": Outcome.BLOCKS, "four": Outcome.OK}

    def test_it_leaves_the_watermark_free_unless_nothing_runs(self):
        engine = harness(num_blocks=11, watermark=0.2)
        engine.add(range(36), id="alone")  # nine of ten blocks
        assert outcomes(engine) == {"alone": Outcome.OK}
        engine = harness(num_blocks=11, watermark=0.2)
        engine.add(range(8), id="a")
        engine.add(range(40, 68), id="seven")
        engine.add(range(70, 94), id="six")
        assert outcomes(engine) == {"a": Outcome.OK, "seven": Outcome.BLOCKS, "six": Outcome.OK}

    def test_without_reserve_full_prompt_the_first_chunk_is_enough(self):
        engine = harness(num_blocks=6, long_prefill_token_threshold=4, reserve_full_prompt=False)
        engine.add(range(8), id="a")
        engine.add(range(40, 57), id="long")
        assert outcomes(engine) == {"a": Outcome.OK, "long": Outcome.OK}

    def test_free_hits_count_as_blocks_needed(self):
        engine = harness(num_blocks=6)
        engine.add(range(17), id="a", max_tokens=1)
        engine.run()
        engine.add(range(50, 58), id="b")
        engine.add(range(17), id="again")  # four hits, all free, and one more; three are left
        assert outcomes(engine) == {"b": Outcome.OK, "again": Outcome.BLOCKS}

    def test_after_a_preemption_for_blocks_nothing_waiting_is_admitted(self):
        def plan(step):
            for request in step.continue_running():
                while step.schedule(request) is Outcome.BLOCKS:
                    step.preempt(step.running[-1])
            return {request.id: step.schedule(request) for request in step.waiting}

        engine = harness(plan, num_blocks=6)
        engine.add(range(8), id="a")
        engine.add(range(20, 28), id="b")
        engine.step()  # four of five blocks, and both need another one
        engine.add([1], id="late")
        assert outcomes(engine) == {"late": Outcome.BLOCKS}
        assert engine.plans[-1].preempted
        assert engine.core.kv.pool.num_free == 2, "there would be room, but not for long"

    def test_after_a_preemption_for_other_reasons_admission_goes_on(self):
        def plan(step):
            for request in step.running:
                step.preempt(request)
            return {request.id: step.schedule(request) for request in step.waiting}

        engine = harness(plan)
        engine.add(range(8), id="a")
        engine.step()
        engine.add([1], id="late")
        assert outcomes(engine) == {"late": Outcome.OK}

    def test_alone_and_too_large_ends_with_kv_capacity(self):
        engine = harness(num_blocks=4)
        engine.add(range(13), id="large")
        assert outcomes(engine) == {"large": Outcome.DONE}
        assert engine.records["large"].error_code == "kv_capacity"
        assert "13 tokens" in engine.records["large"].finish.error
        assert "raise cache.memory" in engine.records["large"].finish.error
        engine.check_end()

    def test_alone_and_grown_too_large_ends_with_kv_capacity(self):
        engine = harness(num_blocks=4)
        engine.add(range(9), id="grows", max_tokens=20)
        engine.run()
        record = engine.records["grows"]
        assert record.error_code == "kv_capacity"
        assert record.tokens == engine.expected("grows")[0][:4], "what was generated is the client's"

    def test_not_alone_it_waits_instead(self):
        engine = harness(num_blocks=4)
        engine.add(range(4), id="a", max_tokens=2)
        engine.add(range(40, 53), id="large")
        assert outcomes(engine) == {"a": Outcome.OK, "large": Outcome.BLOCKS}
        engine.run()
        assert engine.records["a"].reason == "length"
        assert engine.records["large"].error_code == "kv_capacity"

    def test_a_pin_is_a_reason_to_wait(self):
        engine = harness(num_blocks=4)
        [block] = engine.core.kv.pool.allocate(1)
        engine.core.kv.pool.pin(block)
        engine.core.kv.pool.release([block])
        engine.add(range(12), id="a", max_tokens=1)
        assert outcomes(engine) == {"a": Outcome.BLOCKS}
        engine.core.kv.pool.unpin(block)
        assert outcomes(engine) == {"a": Outcome.OK}


class TestBudgets:
    def test_tokens_of_a_step(self):
        engine = harness(max_num_batched_tokens=10)
        engine.add(range(8), id="a")
        engine.add(range(50, 58), id="b")
        engine.add([1], id="c")
        assert outcomes(engine) == {"a": Outcome.OK, "b": Outcome.OK, "c": Outcome.BUDGET}
        assert engine.plans[-1].num_tokens == [8, 2]
        assert engine.plans[-1].sample == [True, False]

    def test_seats(self):
        engine = harness(max_num_seqs=2)
        for name in "abc":
            engine.add([ord(name)], id=name)
        assert outcomes(engine) == {"a": Outcome.OK, "b": Outcome.OK, "c": Outcome.SEATS}

    def test_one_chunk_may_be_capped(self):
        engine = harness(long_prefill_token_threshold=3)
        engine.add(range(8), id="a", max_tokens=1)
        engine.run()
        assert [plan.num_tokens for plan in engine.plans] == [[3], [3], [2]]
        assert [plan.sample for plan in engine.plans] == [[False], [False], [True]]

    def test_a_policy_may_ask_for_a_smaller_chunk(self):
        engine = harness(lambda step: [step.schedule(r, 5) for r in (*step.running, *step.waiting)])
        engine.add(range(8), id="a", max_tokens=1)
        engine.run()
        assert [plan.num_tokens for plan in engine.plans] == [[5], [3]]

    @pytest.mark.parametrize("size", [0, -1, 0.5])
    def test_a_chunk_of_nothing_is_over_budget(self, size):
        engine = harness(lambda step: [step.schedule(r, size) for r in step.waiting])
        engine.add(range(8), id="a")
        engine.core.plan(0.0)
        assert engine.core._policy.policy.log == [[Outcome.BUDGET]]

    def test_a_chunk_that_is_no_integer_is_rounded_down(self):
        engine = harness(lambda step: [step.schedule(r, 2.9) for r in (*step.running, *step.waiting)])
        engine.add(range(5), id="a", max_tokens=1)
        engine.run()
        assert [plan.num_tokens for plan in engine.plans] == [[2], [2], [1]]

    def test_decodes_come_before_prefills(self):
        engine = harness(max_num_batched_tokens=6)
        engine.add(range(9), id="long")
        engine.step()
        engine.add([1], id="short")
        engine.step()  # the rest of the prefill, and the short one
        engine.add(range(20, 29), id="longer")
        engine.step()
        engine.step()
        assert engine.plans[-1].num_tokens == [1, 1, 4]


class TestOutcomes:
    def test_only_ok_is_true(self):
        assert [outcome for outcome in Outcome if outcome] == [Outcome.OK]

    def test_a_request_has_one_place_in_a_step(self):
        seen = []
        engine = harness(lambda step: seen.extend(step.schedule(r) for r in [*step.waiting] * 3))
        engine.add(range(8), id="a")
        plan = engine.plan()
        assert seen == [Outcome.OK, Outcome.DONE, Outcome.DONE]
        assert len(plan.slots) == 1

    def test_a_finished_request_is_done(self):
        old = []
        engine = harness(lambda step: (step.schedule(old[0]), step.preempt(old[0])) if old else schedule_all(step))
        engine.add([1], id="a", max_tokens=1)
        old.append(engine.state("a"))
        stash, old[:] = old[:], []
        engine.step()
        old[:] = stash
        engine.add([2], id="b")
        engine.plan()
        assert engine.core._policy.policy.log[-1] == (Outcome.DONE, 0)

    def test_a_foreign_object_with_the_id_of_a_request_is_done(self):
        class Foreign:
            id = "a"

        engine = harness(lambda step: (step.schedule(Foreign()), step.fits(Foreign()), step.cached_tokens(Foreign())))
        engine.add([1], id="a")
        engine.plan()
        assert engine.core._policy.policy.log == [(Outcome.DONE, False, 0)]

    def test_a_request_whose_prefix_is_being_computed_in_this_step_is_not_ready(self):
        engine = harness()
        engine.add(range(9), id="a")
        engine.add([*range(8), 99], id="b")
        engine.add([*range(4), 99, 99], id="c")
        engine.add(range(3), id="too short to share")
        assert outcomes(engine) == {
            "a": Outcome.OK,
            "b": Outcome.NOT_READY,
            "c": Outcome.NOT_READY,
            "too short to share": Outcome.OK,
        }
        assert outcomes(harness_after(engine)) == {"b": Outcome.OK, "c": Outcome.OK}
        assert [admission.num_cached_tokens for admission in engine.plans[-1].admitted] == [8, 4]

    def test_a_blocked_request_is_not_waiting(self):
        engine = harness(lambda step: schedule_all(step) | {"x": step.schedule(engine.state("x"))})
        engine.add([1], id="x", blocked_on=("grammar", "sibling"))
        engine.add([2], id="y")
        assert outcomes(engine) == {"y": Outcome.OK, "x": Outcome.NOT_READY}
        engine.core.unblock("x", "grammar")
        engine.complete()
        assert outcomes(engine) == {"x": Outcome.NOT_READY}
        engine.core.unblock("x", "sibling")
        engine.complete()
        assert engine.core.queues.waiting.snapshot() == [engine.state("x")]
        engine.core._policy.policy._plan = schedule_all
        assert outcomes(engine) == {"x": Outcome.OK}

    def test_an_outcome_that_is_not_ok_changes_nothing(self):
        engine = harness(num_blocks=6)
        engine.add(range(8), id="a")
        engine.plan()
        engine.complete()
        engine.add(range(40, 60), id="large")
        state, free = engine.state("large"), engine.core.kv.pool.num_free
        before = (state.num_planned, state.slot, state.generation, [list(table) for table in state.blocks])
        assert outcomes(engine) == {"large": Outcome.BLOCKS}
        assert (state.num_planned, state.slot, state.generation, [list(t) for t in state.blocks]) == before
        assert engine.core.kv.pool.num_free == free - 1, "the running request took a block"


def harness_after(engine):
    engine.complete()
    return engine


class TestContinueRunning:
    def test_it_returns_those_without_a_block_and_only_those(self):
        engine = harness(
            lambda step: [r.id for r in step.continue_running()] if step.running else schedule_all(step), num_blocks=6
        )
        for name, length in (("a", 8), ("b", 7), ("c", 4)):
            engine.add([ord(name)] * length, id=name)
        engine.step()  # every block is taken now; "a" and "c" need another one
        assert engine.core.kv.pool.num_free == 0
        assert outcomes(engine) == ["a", "c"]
        assert engine.plans[-1].num_tokens == [1]

    def test_it_takes_an_order(self):
        def plan(step):
            step.continue_running(order=lambda request: -request.priority)
            schedule_all(step)

        engine = harness(plan, max_num_batched_tokens=3)
        for priority in (0, 1, 2):
            engine.add([priority], id=f"p{priority}", priority=priority)
        engine.step()
        engine.plan()
        assert engine.plans[-1].slots == [engine.state(f"p{priority}").slot for priority in (2, 1, 0)]


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
