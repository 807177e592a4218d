"""`EngineCore`: failures, what the front and the policy hear, and the check of its own books."""

import logging

import pytest

from interlace.errors import InterlaceError
from interlace.messages import SamplingParams, StepResult, TokenLogprobs
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler


def harness(scheduler=None, **options) -> EngineHarness:
    limits = options.pop("limits", SchedulerLimits(watermark=0.0))
    return EngineHarness(scheduler or Fcfs(Fcfs.Options()), limits=limits, **options)


class Listens(Fcfs):
    """Writes down what it hears."""

    def __init__(self):
        super().__init__(self.Options())
        self.heard = []

    def on_arrival(self, request, now):
        self.heard.append(("arrival", request.id, now))

    def on_update(self, progress, now):
        self.heard.append(("update", [r.id for r in progress.requests], list(progress.num_new_tokens), now))

    def on_finish(self, request, now):
        self.heard.append(("finish", request.id, now))


class TestFailures:
    def test_an_error_of_one_row_ends_only_its_request(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=3)
        engine.add([2], id="b", max_tokens=3)
        slot = []
        engine.executor.row_error = lambda plan, row: "no mask left" if plan.slots[row] in slot else None
        engine.step()
        slot.append(engine.state("b").slot)
        assert engine.step().stats.num_failed_requests == 1
        record = engine.records["b"]
        assert (record.error_code, record.finish.error, len(record.tokens)) == ("step_failed", "no mask left", 1)
        slot.clear()
        engine.run()
        assert engine.records["a"].reason == "length"

    def test_a_failed_step_ends_its_requests_and_no_others(self):
        engine = harness(fail_steps=(1,), limits=SchedulerLimits(max_num_batched_tokens=1))
        engine.add([1], id="a", max_tokens=3)
        engine.add([2], id="b", max_tokens=3)
        engine.step()
        engine.step()
        failed = [name for name, record in engine.records.items() if record.error_code == "step_failed"]
        assert failed == ["a"]
        assert "scripted failure of step 1" in engine.records["a"].finish.error
        engine.run()
        assert engine.records["b"].reason == "length"

    @pytest.mark.parametrize("ran", [True, False])
    def test_prefixes_of_a_failed_step_are_withdrawn(self, ran):
        engine = harness(fail_steps=(0,), failed_steps_run=ran)
        engine.add(range(12), id="a")
        engine.step()
        assert engine.core.kv.pool.num_cached == 0
        engine.add(range(12), id="b", max_tokens=2)
        engine.run()
        assert engine.records["b"].cached_tokens == 0

    def test_a_sample_that_never_comes_ends_the_request(self):
        engine = harness()
        engine.add([1], id="a")
        plan = engine.core.plan(0.0)
        result = StepResult(step_id=plan.step_id, counts=[0], token_ids=[], duration=0.0)
        output = engine.core.update(result, 0.0)
        assert output.finished["a"].error_code == "step_failed"
        assert "no token" in output.finished["a"].error

    def test_results_out_of_order_are_an_error_of_the_executor(self):
        engine = harness()
        engine.add([1], id="a")
        engine.core.plan(0.0)
        with pytest.raises(InterlaceError, match="result of step 7 arrived, step 0 was expected"):
            engine.core.update(StepResult(step_id=7, counts=[1], token_ids=[1], duration=0.0), 0.0)

    def test_a_policy_hears_of_a_request_before_its_key_is_asked_for(self):
        class Remembers(Listens):
            def order_key(self, request):
                self.heard.append(("key", request.id))
                return request.arrival_time

        policy = Remembers()
        harness(policy).add([1], id="a")
        assert policy.heard == [("arrival", "a", 0.0), ("key", "a")]

    @pytest.mark.parametrize("method", ["on_arrival", "on_update", "on_finish"])
    def test_a_policy_that_raises_where_it_listens_hurts_nobody(self, method, caplog):
        class Faulty(Fcfs):
            pass

        def fault(self, *arguments):
            raise RuntimeError("deaf")

        setattr(Faulty, method, fault)
        engine = harness(Faulty(Faulty.Options()))
        engine.add([1], id="a", max_tokens=2)
        engine.run()
        assert f"scheduler 'faulty' failed in {method}" in caplog.text


class TestNews:
    def test_logprobs_are_cut_with_the_tokens(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=2)
        plan = engine.core.plan(0.0)
        entries = [TokenLogprobs([token], [-1.0], 1) for token in (5, 6, 7)]
        result = StepResult(step_id=plan.step_id, counts=[3], token_ids=[5, 6, 7], duration=0.0, logprobs={0: entries})
        output = engine.core.update(result, 0.0)
        assert (output.counts, output.token_ids) == ([2], [5, 6]), "max_tokens is 2"
        assert output.logprobs == {"a": entries[:2]}

    def test_prompt_logprobs_are_said_once_although_a_preempted_prompt_is_computed_again(self):
        """The first chunk is reported, then the request loses its place, then all chunks come again."""
        scheduler = ScriptedScheduler(lambda step: None)
        engine = harness(scheduler, limits=SchedulerLimits(watermark=0.0))
        core = engine.core
        engine.add([1, 2, 3, 4, 5], id="a", params=SamplingParams(prompt_logprobs=0, max_tokens=1))
        found = []

        def chunk(tokens: int) -> None:
            scheduler._plan = lambda step: step.schedule(engine.state("a"), tokens)
            start = engine.state("a").num_planned
            plan = core.plan(0.0)
            end = min(start + tokens, 4)
            entries = [TokenLogprobs([position + 2], [-1.0], 1) for position in range(start, end)]
            sampled = [9] if plan.sample[0] else []
            result = StepResult(
                step_id=plan.step_id,
                counts=[len(sampled)],
                token_ids=sampled,
                duration=0.0,
                prompt_logprobs={0: entries},
            )
            found.extend(core.update(result, 0.0).prompt_logprobs.get("a", []))

        chunk(2)
        scheduler._plan = lambda step: step.preempt(engine.state("a"))
        assert core.plan(0.0) is None
        chunk(3)
        chunk(2)
        assert [entry.token_ids for entry in found] == [[2], [3], [4], [5]]

    def test_prompt_logprobs_of_chunks_add_up(self):
        engine = harness(limits=SchedulerLimits(max_num_batched_tokens=2))
        engine.add([1, 2, 3], id="a", params=SamplingParams(prompt_logprobs=0, max_tokens=1))
        found = []
        for _ in range(2):
            plan = engine.core.plan(0.0)
            entry = TokenLogprobs([plan.step_id], [-1.0], 1)
            sampled = sum(plan.sample)
            result = StepResult(
                step_id=plan.step_id,
                counts=[sampled],
                token_ids=[1] * sampled,
                duration=0.0,
                prompt_logprobs={0: [entry]},
            )
            found += engine.core.update(result, 0.0).prompt_logprobs["a"]
        assert [entry.token_ids for entry in found] == [[0], [1]]

    def test_first_scheduled_is_told_once_with_the_time_of_planning(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=3)
        engine.clock.advance(2.5)
        output = engine.step()
        assert output.first_scheduled == {"a": 2.5}
        assert engine.step().first_scheduled == {}

    def test_stats_count_the_step(self):
        engine = harness(num_blocks=11)
        engine.add([1], id="a")
        engine.step()
        engine.add(range(20, 25), id="b")
        engine.add([3], id="c", blocked_on=("grammar",))
        stats = engine.step().stats
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        assert (stats.num_scheduled_requests, stats.num_scheduled_tokens, stats.num_prefill_tokens) == (2, 6, 5)
        assert (stats.num_sampled_tokens, stats.num_preemptions) == (2, 0)
        assert stats.kv_usage == pytest.approx(0.3)
        assert stats.duration == 0.001
        assert (stats.num_blocked, stats.num_failed_requests) == (1, 0)

    def test_a_policy_hears_arrivals_updates_and_ends(self):
        policy = Listens()
        engine = harness(policy)
        engine.add([1], id="a", max_tokens=2)
        engine.clock.advance(1.0)
        engine.run()
        assert policy.heard == [
            ("arrival", "a", 0.0),
            ("update", ["a"], [1], 1.01),
            ("update", ["a"], [1], 1.02),
            ("finish", "a", 1.02),
        ]


class TestIntegrity:
    """What the engine's own check must notice."""

    @pytest.fixture
    def engine(self):
        engine = harness()
        engine.add([1], id="a")
        engine.add([2], id="b")
        engine.plan()
        engine.core.check_integrity()
        return engine

    def test_a_lost_request(self, engine):
        del engine.core.queues.running[engine.state("a")]
        with pytest.raises(AssertionError, match="lost, or in two queues"):
            engine.core.check_integrity()

    def test_a_request_in_two_queues(self, engine):
        engine.core.queues.waiting.add(engine.state("a"))
        with pytest.raises(AssertionError, match="lost, or in two queues"):
            engine.core.check_integrity()

    def test_a_lost_slot(self, engine):
        engine.core.queues._free_slots.pop()
        with pytest.raises(AssertionError, match="a slot is lost"):
            engine.core.check_integrity()

    def test_a_slot_given_twice(self, engine):
        engine.state("a").slot = engine.state("b").slot
        with pytest.raises(AssertionError, match="given twice"):
            engine.core.check_integrity()

    def test_counts_that_contradict(self, engine):
        engine.state("a").num_planned = 9
        with pytest.raises(AssertionError, match="contradict each other"):
            engine.core.check_integrity()

    def test_a_status_that_does_not_fit_the_queue(self, engine):
        engine.state("a").slot = -1
        with pytest.raises(AssertionError, match="does not agree with its queue or slot"):
            engine.core.check_integrity()


def test_the_core_is_quiet_when_all_is_well(caplog):
    caplog.set_level(logging.DEBUG)
    engine = harness()
    engine.add([1], max_tokens=3)
    engine.run()
    assert not caplog.records
