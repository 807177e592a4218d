"""Who runs first, and who gives way, under the built-in policies."""

import pytest
from pydantic import ValidationError

from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.plugins.schedulers.priority import Priority
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness


def harness(policy, **limits) -> EngineHarness:
    options = {"num_blocks": limits.pop("num_blocks", 64)}
    return EngineHarness(policy, limits=SchedulerLimits(**({"watermark": 0.0} | limits)), **options)


def priority(aging_s=0.0) -> Priority:
    return Priority(Priority.Options(aging_s=aging_s))


def order_of_start(engine) -> list[str]:
    """Requests in the order in which they were first planned."""
    engine.run()
    return sorted(engine.records, key=lambda name: engine.records[name].first_scheduled)


def arrive(engine, *requests) -> None:
    """(id, priority) one after the other, a tenth of a second apart."""
    for name, level in requests:
        engine.add([ord(name[0])], id=name, priority=level, max_tokens=2)
        engine.clock.advance(0.1)


class TestFcfs:
    def test_requests_start_in_order_of_arrival(self):
        engine = harness(Fcfs(Fcfs.Options()), max_num_seqs=1)
        arrive(engine, ("c", 2), ("a", 0), ("b", 1))
        assert order_of_start(engine) == ["c", "a", "b"]

    def test_the_last_to_arrive_gives_way(self):
        engine = harness(Fcfs(Fcfs.Options()), num_blocks=6)
        for name in "ab":
            engine.add([ord(name)] * 8, id=name, max_tokens=8)
            engine.clock.advance(0.1)
        engine.run()
        preemptions = {name: record.finish.num_preemptions for name, record in engine.records.items()}
        assert preemptions["a"] == 0
        assert preemptions["b"] >= 1

    def test_among_equals_the_last_one_admitted_gives_way(self):
        engine = harness(Fcfs(Fcfs.Options()), num_blocks=6)
        for name in "ab":
            engine.add([ord(name)] * 8, id=name, max_tokens=8, arrival_time=0.0)
        engine.run()
        assert engine.records["a"].finish.num_preemptions == 0
        assert engine.records["b"].finish.num_preemptions == 1, "and once is enough"

    def test_a_request_that_does_not_fit_is_not_overtaken(self):
        engine = harness(Fcfs(Fcfs.Options()), num_blocks=6)
        engine.add([1] * 8, id="first", max_tokens=4)
        engine.clock.advance(0.1)
        engine.add([2] * 13, id="large", max_tokens=1)
        engine.clock.advance(0.1)
        engine.add([3], id="small", max_tokens=1)
        assert order_of_start(engine) == ["first", "large", "small"]

    def test_it_says_that_nobody_starves(self):
        assert Fcfs.starvation_free


class TestPriority:
    def test_the_lower_number_starts_first_and_arrival_breaks_ties(self):
        engine = harness(priority(), max_num_seqs=1)
        arrive(engine, ("c", 2), ("b1", 1), ("a", -5), ("b2", 1))
        assert order_of_start(engine) == ["a", "b1", "b2", "c"]

    def test_a_newcomer_of_higher_priority_overtakes_who_waits(self):
        engine = harness(priority(), max_num_seqs=1)
        arrive(engine, ("running", 0), ("waiting", 1))
        engine.step()
        arrive(engine, ("urgent", 0))
        assert order_of_start(engine) == ["running", "urgent", "waiting"]

    def test_the_least_urgent_gives_way_even_if_it_came_first(self):
        engine = harness(priority(), num_blocks=6)
        engine.add([1] * 8, id="patient", priority=1, max_tokens=8)
        engine.clock.advance(0.1)
        engine.add([2] * 8, id="urgent", priority=0, max_tokens=8)
        engine.run()
        assert engine.records["urgent"].finish.num_preemptions == 0
        assert engine.records["patient"].finish.num_preemptions >= 1

    def test_a_preempted_request_waits_at_its_place(self):
        engine = harness(priority(), num_blocks=6, max_num_seqs=2)
        for name, level in (("a", 0), ("b", 1)):
            engine.add([ord(name)] * 8, id=name, priority=level, max_tokens=8)
        engine.step()
        for name, level in (("c", 2), ("a2", 0)):
            engine.add([ord(name[0])] * 4, id=name, priority=level, max_tokens=1)
        while not engine.core.queues.waiting.snapshot() or not engine.state("b").num_preemptions:
            engine.step()
        assert [state.id for state in engine.core.queues.waiting.snapshot()] == ["a2", "b", "c"]
        engine.run()

    def test_without_aging_urgent_ones_may_hold_back_others_for_ever(self):
        assert not priority().starvation_free
        engine = harness(priority(), max_num_seqs=1, starvation_timeout_s=1.0)
        arrive(engine, ("p", 1))
        for index in range(60):
            arrive(engine, (f"u{index}", 0))
            engine.step()
        assert engine.records["p"].first_scheduled is None
        assert "'p'" in engine.core.degraded

    def test_with_aging_waiting_is_worth_priority(self):
        assert priority(aging_s=1.0).starvation_free
        engine = harness(priority(aging_s=1.0), max_num_seqs=1)
        arrive(engine, ("p", 1))
        for index in range(60):
            arrive(engine, (f"u{index}", 0))
            engine.step()
        assert engine.records["p"].first_scheduled is not None
        assert 0.9 < engine.records["p"].first_scheduled < 4.0

    def test_aging_leaves_equals_in_order_of_arrival(self):
        engine = harness(priority(aging_s=0.5), max_num_seqs=1)
        arrive(engine, ("a", 1), ("b", 1), ("c", 1))
        assert order_of_start(engine) == ["a", "b", "c"]

    @pytest.mark.parametrize("options", [{"aging_s": -1}, {"ageing_s": 1}])
    def test_options_are_validated(self, options):
        with pytest.raises(ValidationError):
            Priority.Options(**options)
