"""What the built-in orderings sort by, and how the scheduler `ordered` combines them."""

from __future__ import annotations

import pytest

from interlace.plugins.orderings.arrival import Fcfs, Priority
from interlace.plugins.orderings.length import FewestRemaining, ShortestPrompt
from interlace.plugins.schedulers.ordered import Ordered
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness


def made(ordering, **options):
    return ordering(ordering.Options(**options))


def service_order(*orderings, requests) -> list[str]:
    """Ids in the order in which one seat serves `requests`, (arrival, fields) by id."""
    policy = Ordered(Ordered.Options(order=["named"] * len(orderings)), order=orderings)
    engine = EngineHarness(policy, limits=SchedulerLimits(max_num_seqs=1), max_model_len=128)
    for name, (arrival, fields) in requests.items():
        settings = {"prompt": 2, "max_tokens": 2, **fields}
        engine.add([1] * settings.pop("prompt"), id=name, arrival_time=arrival, **settings)
    engine.run()
    return sorted(engine.records, key=lambda name: engine.records[name].first_step)


def test_fcfs_takes_the_earliest_whatever_order_they_came_in():
    requests = {"late": (2.0, {}), "early": (1.0, {})}
    assert service_order(made(Fcfs), requests=requests) == ["early", "late"]


def test_priority_takes_the_lower_number_and_arrival_breaks_ties():
    requests = {"second": (1.0, {"priority": 1}), "third": (2.0, {"priority": 1}), "first": (3.0, {"priority": -1})}
    assert service_order(made(Priority), requests=requests) == ["first", "second", "third"]


def test_a_level_is_worth_its_seconds_of_waiting():
    aging = made(Priority, aging_s=10.0)
    requests = {"urgent": (25.0, {"priority": 0}), "patient": (5.0, {"priority": 1})}
    assert service_order(aging, requests=requests | {"last": (5.0, {"priority": 3})}) == ["patient", "urgent", "last"]
    assert service_order(made(Priority), requests=requests)[0] == "urgent"


def test_aging_leaves_the_requests_of_one_window_to_the_next_ordering():
    requests = {"long": (1.0, {"prompt": 9}), "short": (9.0, {"prompt": 3}), "next_window": (11.0, {"prompt": 1})}
    order = service_order(made(Priority, aging_s=10.0), made(ShortestPrompt), requests=requests)
    assert order == ["short", "long", "next_window"]
    assert service_order(made(ShortestPrompt), requests=requests)[0] == "next_window"


def test_fewest_remaining_counts_prompt_and_limit():
    requests = {
        "long_answer": (1.0, {"prompt": 2, "max_tokens": 30}),
        "long_prompt": (2.0, {"prompt": 20, "max_tokens": 2}),
        "no_limit": (0.0, {"prompt": 1, "max_tokens": None}),
    }
    assert service_order(made(FewestRemaining), requests=requests) == ["long_prompt", "long_answer", "no_limit"]
    assert service_order(made(ShortestPrompt), requests=requests) == ["no_limit", "long_answer", "long_prompt"]


def test_buckets_leave_ties_to_the_next_ordering():
    requests = {"a": (1.0, {"prompt": 7}), "b": (2.0, {"prompt": 4}), "c": (3.0, {"prompt": 3})}
    assert service_order(made(ShortestPrompt), made(Fcfs), requests=requests) == ["c", "b", "a"]
    assert service_order(made(ShortestPrompt, bucket_tokens=4), made(Fcfs), requests=requests) == ["c", "a", "b"]


def test_order_matters():
    requests = {
        "urgent_long": (2.0, {"priority": 0, "prompt": 9}),
        "urgent_short": (3.0, {"priority": 0, "prompt": 3}),
        "lazy_short": (1.0, {"priority": 1, "prompt": 2}),
    }
    by_priority = service_order(made(Priority), made(ShortestPrompt), requests=requests)
    assert by_priority == ["urgent_short", "urgent_long", "lazy_short"]
    by_length = service_order(made(ShortestPrompt), made(Priority), requests=requests)
    assert by_length == ["lazy_short", "urgent_short", "urgent_long"]


@pytest.mark.parametrize(
    ("orderings", "expected"),
    [
        ([made(Fcfs)], True),
        ([made(Priority), made(Fcfs)], False),
        ([made(Priority, aging_s=5.0), made(ShortestPrompt)], True),
        ([made(ShortestPrompt), made(Priority, aging_s=5.0)], False),
    ],
)
def test_a_combination_is_fair_if_its_first_ordering_is(orderings, expected):
    assert Ordered(Ordered.Options(), order=orderings).starvation_free is expected


def test_a_key_is_asked_once_and_forgotten_at_the_end():
    class Whim(Fcfs):
        """Another key at every call."""

        calls = 0

        def key(self, request):
            self.calls += 1
            return -self.calls

    whim = made(Whim)
    policy = Ordered(Ordered.Options(order=["whim"]), order=[whim])
    engine = EngineHarness(policy, limits=SchedulerLimits(max_num_seqs=4), num_blocks=12)
    for _ in range(6):
        engine.add([1, 2, 3, 4, 5], max_tokens=12)
    engine.run()
    assert sum(record.finish.num_preemptions for record in engine.records.values()) > 0, "no victim was ever chosen"
    assert whim.calls == 6 and not policy._keys


def test_the_last_in_the_order_gives_way():
    policy = Ordered(Ordered.Options(order=["priority"]), order=[made(Priority)])
    engine = EngineHarness(policy, num_blocks=8)
    for name, priority in (("mid", 1), ("low", 2), ("top", 0)):
        engine.add([1, 2, 3], id=name, priority=priority, max_tokens=12)
    engine.run()
    preempted = {name: record.finish.num_preemptions for name, record in engine.records.items()}
    assert preempted["low"] > 0 and preempted["top"] == 0
