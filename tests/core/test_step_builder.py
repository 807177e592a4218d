"""`StepBuilder`: budgets, outcomes, and going on with what runs."""

import pytest

from interlace.interfaces.scheduler import Outcome
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
