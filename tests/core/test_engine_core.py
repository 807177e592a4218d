"""`EngineCore`: requests in, plans out, results in, news out."""

import pytest

from interlace.errors import InvalidRequestError
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler


def harness(scheduler=None, **options) -> EngineHarness:
    limits = options.pop("limits", SchedulerLimits(watermark=0.0))
    return EngineHarness(scheduler or Fcfs(Fcfs.Options()), limits=limits, **options)


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
        assert (last.prefix_queries, last.prefix_hits) == (24, 8)

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
