"""The queue is bounded where requests enter it, however many come between two steps."""

import pytest

from interlace import SamplingParams
from interlace.engine.front import Front
from interlace.engine.input_processor import RequestOptions
from interlace.errors import OverloadedError
from interlace.messages import StepOutput, StepStats
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly

LIMIT = 10
SEATS = 256
"""The default of `scheduler.max_num_seqs`."""
ANSWER = [1, 2, 3, 4, 5, 6, 7, 8]


class Sink:
    def deliver(self, requests):
        pass


@pytest.fixture
def client():
    return ScriptedClient(lambda request: ANSWER, auto=False)


@pytest.fixture
def front(client):
    front = Front(fake_assembly(client))
    front.limit_waiting(LIMIT)
    yield front
    front.shutdown()


def submit(front, count=1, n=1):
    params = SamplingParams(n=n, max_tokens=8)
    prepared = [front.prepare("x", params, options=RequestOptions()) for _ in range(count)]
    return front.submit(prepared, Sink(), streaming=True)


def accepted(front, tries):
    """How many of `tries` single requests find room."""
    taken = 0
    for _ in range(tries):
        try:
            submit(front)
        except OverloadedError:
            continue
        taken += 1
    return taken


def congest(client):
    """A step that leaves requests waiting, as the engine tells it."""
    fields = dict.fromkeys(StepStats.__struct_fields__, 0) | {"num_waiting": 5, "degraded": None, "plugin_seconds": {}}
    output = StepOutput(step_id=99, now=0.0, request_ids=[], counts=[], token_ids=[], stats=StepStats(**fields))
    client._on_output(output)


def test_a_burst_within_one_step_is_bounded(front, client):
    assert accepted(front, 5000) == SEATS + LIMIT
    assert len(client.added) == SEATS + LIMIT
    assert front.num_waiting == SEATS + LIMIT


def test_room_comes_back_with_steps_and_with_ends(front, client):
    accepted(front, 5000)
    client.step()
    assert front.num_waiting == 0
    assert accepted(front, 5000) == LIMIT  # no seat is free
    while front.num_active:
        client.step()
    assert accepted(front, 5000) == SEATS + LIMIT


def test_those_that_leave_make_room_at_once(front):
    requests = [submit(front)[0] for _ in range(SEATS + LIMIT)]
    assert accepted(front, 1) == 0
    front.abort(requests[:3])
    assert front.num_waiting <= SEATS + LIMIT


def test_samples_count_and_a_refused_group_leaves_nothing_behind(front, client):
    submit(front, count=SEATS)
    submit(front, n=LIMIT - 1)
    with pytest.raises(OverloadedError, match=r"265 requests are waiting already \(server.max_waiting = 10\).* 2 more"):
        submit(front, count=2)
    assert front.num_active == SEATS + LIMIT - 1 == len(client.added)
    submit(front)


def test_seats_do_not_count_where_blocks_are_short(front, client):
    submit(front, count=20)
    client.step()  # they run: 236 seats are free
    congest(client)
    assert accepted(front, 5000) == LIMIT


def test_without_a_limit_everything_is_taken(client):
    front = Front(fake_assembly(client))
    assert accepted(front, 1000) == 1000
    front.shutdown()
