"""`Queues`: every request in one place, the waiting ones sorted, slots given once."""

import math
import random

import pytest

from interlace.messages import EngineRequest, SamplingParams
from interlace.request import RequestState, Status
from interlace.scheduling.queues import Queues, WaitingQueue


def request(id="r", arrival=0.0, priority=0, **fields) -> RequestState:
    engine_request = EngineRequest(
        id=id,
        prompt_token_ids=[1],
        params=SamplingParams(),
        arrival_time=arrival,
        seed=0,
        priority=priority,
        **fields,
    )
    return RequestState(engine_request, 64, 1)


def by_arrival(state):
    return state.arrival_time


def ids(queue) -> list[str]:
    return [state.id for state in queue.snapshot()]


class TestWaitingQueue:
    def test_it_is_sorted_by_the_order_key_whatever_the_order_of_adding(self):
        queue = WaitingQueue(lambda state: (state.priority, state.arrival_time))
        states = [request(f"{p}{a}", a, p) for p in range(4) for a in range(4)]
        random.Random(0).shuffle(states)
        for state in states:
            queue.add(state)
        assert ids(queue) == [f"{p}{a}" for p in range(4) for a in range(4)]

    def test_equals_keep_the_order_of_adding(self):
        queue = WaitingQueue(lambda state: 0)
        for name in "cab":
            queue.add(request(name))
        assert ids(queue) == ["c", "a", "b"]

    def test_a_preempted_request_returns_to_its_place(self):
        queue = WaitingQueue(by_arrival)
        states = [request(name, 1.0) for name in "abc"]
        for state in states:
            queue.add(state)
        queue.remove(states[1])
        assert ids(queue) == ["a", "c"]
        queue.add(states[1])
        assert ids(queue) == ["a", "b", "c"]

    def test_removing_what_does_not_wait_is_an_error(self):
        queue = WaitingQueue(by_arrival)
        queue.add(request("a"))
        with pytest.raises(ValueError, match="not in list"):
            queue.remove(request("b"))

    @pytest.mark.parametrize(
        "keys",
        [[1, "one", 2], [(1, None), (1, "a"), (1, None)], [1.0, None, 0.5], [math.nan, 1.0, math.nan, 0.0]],
        ids=["types", "nested", "none", "nan"],
    )
    def test_keys_that_do_not_sort_lose_nobody(self, keys):
        given = iter(keys)
        queue = WaitingQueue(lambda state: next(given))
        states = [request(f"r{index}", float(-index)) for index in range(len(keys))]
        for state in states:
            queue.add(state)
        assert set(queue.snapshot()) == set(states)
        for state in states:
            queue.remove(state)
        assert len(queue) == 0

    def test_a_key_that_raises_gives_way_to_arrival_order(self, caplog):
        def key(state):
            if state.id == "b":
                raise RuntimeError("no key for b")
            return -state.arrival_time

        queue = WaitingQueue(key)
        for index, name in enumerate("cabd"):
            queue.add(request(name, index))
        assert ids(queue) == ["c", "a", "b", "d"]
        assert "arrival order is used from now on" in caplog.text
        assert "no key for b" in caplog.text

    def test_after_that_a_request_with_an_old_key_finds_its_place_too(self):
        keys = {"a": "text", "b": 1, "c": 2}
        queue = WaitingQueue(lambda state: keys[state.id])
        states = {name: request(name, arrival) for name, arrival in (("a", 2.0), ("b", 1.0), ("c", 3.0))}
        queue.add(states["a"])
        queue.remove(states["a"])  # it runs, with its old key
        queue.add(states["b"])
        queue.add(states["c"])
        queue.add(states["a"])  # cannot be compared
        assert ids(queue) == ["b", "a", "c"]


class TestQueues:
    def test_a_request_passes_from_waiting_to_running_to_finished(self):
        queues = Queues(2, by_arrival)
        state = request()
        queues.add(state)
        assert (state.status, state.slot, queues.seats_left) == (Status.WAITING, -1, 2)
        queues.admit(state)
        assert (state.status, state.slot, queues.seats_left) == (Status.RUNNING, 0, 1)
        queues.finish(state)
        assert (state.status, state.slot, queues.seats_left) == (Status.FINISHED, -1, 2)
        assert queues.released == [0]
        assert not queues.requests

    def test_every_change_of_seat_is_a_new_generation(self):
        queues = Queues(1, by_arrival)
        state = request()
        queues.add(state)
        seen = [state.generation]
        for move in ("admit", "suspend", "admit", "withdraw_admission", "admit", "finish"):
            getattr(queues, move)(state)
            seen.append(state.generation)
        assert seen == sorted(set(seen))

    def test_a_preempted_request_forgets_what_it_computed(self):
        queues = Queues(1, by_arrival)
        state = request()
        queues.add(state)
        queues.admit(state)
        state.num_planned, state.num_in_flight, state.samples_in_flight = 5, 2, 1
        queues.suspend(state)
        assert (state.num_planned, state.num_in_flight, state.samples_in_flight) == (0, 0, 0)
        assert (queues.preempted, queues.released, state.num_preemptions) == ([0], [], 1)
        assert queues.waiting.snapshot() == [state]

    def test_a_withdrawn_admission_is_nobodys_business(self):
        queues = Queues(1, by_arrival)
        state = request()
        queues.add(state)
        queues.admit(state)
        queues.withdraw_admission(state)
        assert (queues.preempted, queues.released, state.num_preemptions) == ([], [], 0)
        assert (state.status, queues.seats_left) == (Status.WAITING, 1)

    def test_a_blocked_request_waits_when_the_last_block_is_lifted(self):
        queues = Queues(1, by_arrival)
        state = request(blocked_on=("grammar", "sibling"))
        queues.add(state)
        queues.unblock(state, "grammar")
        queues.unblock(state, "something else")
        assert len(queues.waiting) == 0
        queues.unblock(state, "sibling")
        assert queues.waiting.snapshot() == [state]
        assert not queues.blocked
        queues.unblock(state, "sibling")
        assert len(queues.waiting) == 1

    def test_a_blocked_request_can_finish(self):
        queues = Queues(1, by_arrival)
        state = request(blocked_on=("grammar",))
        queues.add(state)
        queues.finish(state)
        assert not queues.blocked
        assert not queues.requests
        assert queues.released == []

    def test_running_is_in_order_of_admission(self):
        queues = Queues(3, by_arrival)
        states = [request(name, index) for index, name in enumerate("abc")]
        for state in states:
            queues.add(state)
        for index in (2, 0, 1):
            queues.admit(states[index])
        assert [state.id for state in queues.running] == ["c", "a", "b"]
