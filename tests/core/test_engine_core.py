"""`EngineCore`: requests in, plans out, results in, news out."""

import logging

import pytest

from interlace.errors import InterlaceError, InvalidRequestError
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


class TestLife:
    def test_a_request_gives_its_tokens_and_ends(self):
        engine = harness()
        engine.add([1, 2, 3], id="a", max_tokens=5)
        assert engine.run() == {"a": engine.expected("a")[0]}
        assert engine.records["a"].reason == "length"
        assert len(engine.plans) == 5

    def test_nothing_to_do_is_no_plan(self):
        engine = harness()
        assert engine.plan() is None
        assert not engine.core.has_work
        assert not engine.core.has_runnable

    def test_prefill_and_decode_mix_in_one_step(self):
        engine = harness()
        engine.add([1, 2, 3], id="a")
        engine.step()
        engine.add(range(20, 29), id="b")
        engine.step()
        assert engine.plans[-1].num_tokens == [1, 9]
        assert engine.plans[-1].sample == [True, True]

    def test_an_id_in_use_is_refused_and_may_be_used_again_later(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=1)
        with pytest.raises(InvalidRequestError, match="id 'a' is already running; ids must be unique"):
            engine.add([1], id="a")
        engine.run()
        engine.add([1], id="a", max_tokens=1)
        engine.run()

    def test_a_prompt_that_fills_the_model_ends_at_once(self):
        engine = harness(max_model_len=16)
        engine.add(range(16), id="a")
        record = engine.records["a"]
        assert (record.reason, record.error_code) == ("error", "prompt_too_long")
        assert "16 tokens, max_model_len is 16" in record.finish.error
        assert engine.plan() is None

    def test_an_empty_prompt_ends_at_once(self):
        engine = harness()
        engine.add([], id="a")
        assert engine.records["a"].error_code == "empty_prompt"
        assert engine.plan() is None
        engine.check_end()

    def test_max_model_len_bounds_the_output(self):
        engine = harness(max_model_len=16)
        engine.add(range(12), id="a", max_tokens=None)
        assert len(engine.run()["a"]) == 4
        assert engine.records["a"].reason == "length"


class TestStops:
    def at(self, engine, **fields):
        """Make the third token of request `a` special, whatever it is."""
        engine.add([1, 2, 3], id="probe", max_tokens=3)
        third = engine.run()["probe"][2]
        fields = {key: value(third) if callable(value) else value for key, value in fields.items()}
        engine.add([1, 2, 3], id="a", max_tokens=9, **fields)
        engine.run()
        return engine.records["a"], third

    def test_end_of_sequence(self):
        record, third = self.at(harness(), eos_token_ids=lambda token: (token,))
        assert (record.reason, record.finish.stop_reason, len(record.tokens)) == ("stop", None, 3)
        assert record.tokens[-1] == third

    def test_a_stop_token_is_named(self):
        record, third = self.at(harness(), stop_token_ids=lambda token: [token])
        assert (record.reason, record.finish.stop_reason, len(record.tokens)) == ("stop", third, 3)

    def test_ignore_eos(self):
        record, _ = self.at(harness(), eos_token_ids=lambda token: (token,), ignore_eos=True)
        assert (record.reason, len(record.tokens)) == ("length", 9)

    def test_min_tokens(self):
        record, third = self.at(harness(), stop_token_ids=lambda token: [token], min_tokens=5)
        assert len(record.tokens) >= 5
        assert third not in record.tokens[:5]

    def test_the_last_token_may_be_both_a_stop_and_the_limit(self):
        engine = harness()
        engine.add([1, 2, 3], id="probe", max_tokens=3)
        third = engine.run()["probe"][2]
        engine.add([1, 2, 3], id="a", max_tokens=3, stop_token_ids=[third])
        engine.run()
        assert engine.records["a"].reason == "stop"


class TestAborts:
    def test_while_waiting(self):
        engine = harness()
        engine.add([1], id="a")
        engine.abort("a")
        assert engine.records["a"].reason == "abort"
        assert engine.plan() is None

    def test_while_running_frees_blocks_at_once(self):
        engine = harness()
        engine.add(range(20), id="a")
        engine.step()
        engine.abort("a")
        assert engine.core.kv.pool.num_free == engine.core.kv.pool.num_usable

    def test_while_blocked(self):
        engine = harness()
        engine.add([1], id="a", blocked_on=("grammar",))
        engine.abort("a")
        engine.core.unblock("a", "grammar")
        assert engine.records["a"].reason == "abort"
        engine.check_end()

    def test_unknown_and_finished_ids_are_ignored(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=1)
        engine.run()
        engine.abort("a", "b", "a")
        assert engine.records["a"].reason == "length"

    def test_the_worker_is_told_with_the_next_plan(self):
        engine = harness()
        engine.add(range(4), id="a")
        engine.step()
        engine.abort("a")
        engine.add(range(4), id="b")
        plan = engine.plan()
        assert plan.finished == [plan.admitted[0].slot]


class TestDeadlines:
    @pytest.mark.parametrize("steps", [0, 2], ids=["waiting", "running"])
    def test_a_request_ends_at_its_deadline(self, steps):
        engine = harness(limits=SchedulerLimits(max_num_seqs=1))
        if not steps:
            engine.add([9], id="other", max_tokens=100)
        engine.add([1], id="a", max_tokens=100, deadline=0.05)
        for _ in range(8):
            engine.step()
        record = engine.records["a"]
        assert (record.reason, record.error_code) == ("error", "deadline")
        assert "deadline passed after 0.0" in record.finish.error
        assert engine.core.next_wakeup() is None

    def test_the_driver_is_told_when_to_look(self):
        engine = harness()
        engine.add([1], id="b", deadline=7.0)
        engine.add([1], id="a", deadline=3.0)
        assert engine.core.next_wakeup() == 3.0

    def test_time_zero_is_a_time(self):
        engine = harness()
        engine.add([1], id="a", deadline=0.0)
        assert engine.core.next_wakeup() == 0.0
        assert engine.plan() is None
        assert engine.records["a"].error_code == "deadline"

    def test_an_old_deadline_does_not_hit_a_new_request_of_the_same_id(self):
        engine = harness()
        engine.add([1], id="a", deadline=0.5, max_tokens=1)
        engine.run()
        engine.add([1], id="a", max_tokens=100)
        engine.run()
        assert engine.records["a"].reason == "length"


class TestPrefixHits:
    def test_they_are_counted_once_at_first_admission(self):
        turns = []

        def plan(step):
            turns.append(1)
            step.continue_running()
            if len(turns) % 3 == 0:
                for request in step.running:
                    step.preempt(request)
            for request in step.waiting:
                step.schedule(request)

        engine = harness(ScriptedScheduler(plan))
        engine.add(range(12), id="a", max_tokens=1)
        engine.step()
        engine.add(range(12), id="b", max_tokens=12)
        engine.run()
        last = engine.core
        assert engine.records["b"].finish.num_preemptions > 1
        assert (engine.records["a"].cached_tokens, engine.records["b"].cached_tokens) == (0, 8)
        assert (last._prefix_queries, last._prefix_hits) == (24, 8)

    def test_they_are_in_the_stats_of_every_step(self):
        engine = harness()
        engine.add(range(12), max_tokens=1)
        engine.run()
        engine.add(range(12), max_tokens=1)
        stats = engine.step().stats
        assert (stats.prefix_queries, stats.prefix_hits) == (24, 8)

    def test_the_worker_starts_after_them(self):
        engine = harness()
        engine.add(range(12), max_tokens=1)
        engine.run()
        engine.add(range(12), max_tokens=1)
        plan = engine.plan()
        assert plan.admitted[0].num_cached_tokens == 8
        assert plan.num_tokens == [4]
        assert plan.blocks[0].counts == [3], "the whole table: hits and new blocks"

    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_siblings_share_their_prompt_and_answer_for_themselves(self, prefix_caching):
        engine = harness(prefix_caching=prefix_caching, num_blocks=64)
        for index in range(4):
            engine.add(range(21), id=f"s{index}", sample_index=index, group="g", max_tokens=3)
        engine.step()
        engine.step()
        assert engine.core.kv.pool.num_usable - engine.core.kv.pool.num_free == 5 + 4
        outputs = engine.run()
        assert len({tuple(tokens) for tokens in outputs.values()}) == 4

    def test_resetting_the_cache_forgets_prefixes_and_keeps_requests(self):
        engine = harness()
        engine.add(range(12), id="a", max_tokens=4)
        engine.step()
        engine.core.reset_prefix_cache()
        engine.add(range(12), id="b", max_tokens=4)
        engine.run()
        assert engine.records["b"].cached_tokens == 0


class TestFailures:
    def test_an_error_of_one_row_ends_only_its_request(self):
        engine = harness()
        engine.add([1], id="a", max_tokens=3)
        engine.add([2], id="b", max_tokens=3)
        slot = []
        engine.executor.row_error = lambda plan, row: "no mask left" if plan.slots[row] in slot else None
        engine.step()
        slot.append(engine.state("b").slot)
        engine.step()
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
