"""The front over several engines: a death fails only the requests it took, and what is reported is about all."""

from __future__ import annotations

import pytest

from interlace import SamplingParams, hookimpl
from interlace.config import load_settings
from interlace.engine.front import Front, Observer
from interlace.engine.snapshot import EngineSnapshot, RequestSnapshot, merge_snapshots
from interlace.errors import EngineDeadError, EngineRestartingError, OverloadedError
from interlace.interfaces.router import Router, least_loaded
from interlace.server.metrics.exposition import EngineCollector, make_registry
from interlace.server.metrics.http import HttpTotals
from interlace.server.metrics.totals import TotalsByEngine
from interlace.testing.fleet import SEATS, Fleet
from interlace.testing.front import fake_assembly


class Idlest(Router):
    def route(self, request, replicas):
        return least_loaded(replicas).index


class Inbox:
    def __init__(self):
        self.news = []

    def deliver(self, requests):
        self.news += [request.id for request in requests]


class Listener(Observer):
    def __init__(self):
        self.ends = []

    def on_step(self, step, done):
        self.ends += [(end.request_id, end.finish_reason, end.error_code, step.engine) for end in done.summaries]


class Subscriber:
    def __init__(self):
        self.engines = []

    @hookimpl
    def on_step(self, stats):
        self.engines.append(stats.engine)


@pytest.fixture
def fleet():
    return Fleet(Idlest(Router.Options()), 2)


@pytest.fixture
def subscriber():
    return Subscriber()


@pytest.fixture
def front(fleet, subscriber):
    front = Front(fake_assembly(fleet.replicas, subscribers=(subscriber,)))
    yield front
    front.shutdown()


def submit(front, *names, sink=None, max_tokens=3, n=1):
    params = SamplingParams(max_tokens=max_tokens, n=n)
    prepared = [front.prepare("hello", params, request_id=name) for name in names]
    return front.submit(prepared, sink or Inbox(), streaming=True)


def test_a_death_fails_its_own_requests_and_the_others_go_on(front, fleet):
    inbox, listener = Inbox(), Listener()
    front.observe(listener)
    a, b = submit(front, "a", "b", sink=inbox)
    for client in fleet.clients:
        client.step()
    fleet.clients[1].fall()
    fleet.clients[1].tell()
    with pytest.raises(EngineRestartingError, match=r"^replica 1 of 2: it fell"):
        front.take(b)
    assert listener.ends == [("b", "error", "engine_dead", 1)]
    assert front.num_active == 1 and not front.death.done()
    for _ in range(2):
        fleet.clients[0].step()
    assert front.whole(a).outputs[0].finish_reason == "length"
    assert listener.ends[1:] == [("a", "length", None, 0)]
    [again] = submit(front, "b")  # its id is free
    assert fleet.where("b") == 0
    front.abort([again])


def test_all_samples_of_a_request_fail_with_their_replica(front, fleet):
    (request,) = submit(front, "r", n=3)
    fleet.clients[0].fall()
    fleet.clients[0].tell()
    with pytest.raises(EngineRestartingError):
        front.take(request)
    assert front.num_active == front.num_waiting == 0


def test_the_end_of_all_is_the_end(front, fleet):
    for client in fleet.clients:
        client.fall(for_good=True)
        client.tell()
    assert "it fell" in str(front.death.result(0))
    with pytest.raises(EngineDeadError) as caught:
        submit(front, "late")
    assert type(caught.value) is EngineDeadError


def test_restarts_are_counted_and_subscribers_hear_whose_step_it_is(front, fleet, subscriber):
    for index in (1, 0, 1):
        fleet.clients[index].fall()
        fleet.clients[index].tell()
        fleet.clients[index].come_back()
        fleet.clients[index].step()
    assert front.restarts == 3
    assert subscriber.engines == [1, 0, 1]


def test_there_are_seats_for_all_and_a_limit_on_the_rest(fleet):
    few = load_settings({"scheduler.max_num_seqs": SEATS}, env={})
    front = Front(fake_assembly(fleet.replicas)._replace(loaded=few))
    assert front.num_seats == 2 * SEATS
    front.limit_waiting(2)
    submit(front, *(f"a{number}" for number in range(2 * SEATS + 2)), max_tokens=50)
    with pytest.raises(OverloadedError):
        submit(front, "more")
    for client in fleet.clients:
        client.step()
    assert front.num_waiting == 2, "the seats are taken, two wait"
    with pytest.raises(OverloadedError):
        submit(front, "more")
    front.shutdown()


def test_metrics_have_a_series_for_each_engine(front, fleet):
    totals, http = TotalsByEngine(2), HttpTotals()
    front.observe(totals)
    http.end(("GET", "/health", "200"))
    registry = make_registry(EngineCollector(front, totals.engines, http, "tiny", front.loaded.settings.server))
    submit(front, "a", "b", "c", max_tokens=2)
    for index in (0, 0, 1):
        fleet.clients[index].step()
    fleet.clients[1].fall()
    fleet.clients[1].tell()

    def value(name, engine, **labels):
        return registry.get_sample_value(f"interlace:{name}", {"engine": engine, "model_name": "tiny", **labels})

    assert [value("generation_tokens_total", engine) for engine in "01"] == [4, 1]
    assert [value("steps_total", engine) for engine in "01"] == [2, 1]
    assert [value("request_success_total", e, finished_reason="length") for e in "01"] == [2, 0]
    assert [value("request_errors_total", e, code="engine_dead") for e in "01"] == [None, 1]
    assert [value("engine_up", engine) for engine in "01"] == [1, 0]
    assert [value("time_to_first_token_seconds_count", engine) for engine in "01"] == [2, 1]
    http_labels = {"method": "GET", "route": "/health", "status": "200"}
    assert registry.get_sample_value("interlace:http_requests_total", {"engine": "0", **http_labels}) == 1
    assert registry.get_sample_value("interlace:http_requests_total", {"engine": "1", **http_labels}) is None
    info = {"block_size": "4", "num_gpu_blocks": "64", "enable_prefix_caching": "True", "cache_dtype": "float32"}
    assert registry.get_sample_value("interlace:cache_config_info", {"engine": "1", **info}) == 1


def test_the_report_says_how_many_there_are(front):
    lines = dict(front.report())
    assert lines["replicas"] == "2 engines"
    assert lines["kv cache"].startswith("65 blocks of 4 tokens") and lines["kv cache"].endswith("in each replica")


# ── snapshots ───────────────────────────────────────────────────────────────────────────────────────────────────


def snapshot(num_blocks=4, stride=1, degraded=None, **requests) -> EngineSnapshot:
    """Requests as name=age; all of them run."""
    running = [
        RequestSnapshot(id=name, num_prompt_tokens=1, num_computed_tokens=1, num_output_tokens=0, max_tokens=9, age=age)
        for name, age in requests.items()
    ]
    return EngineSnapshot(
        now=1.0,
        steps=10,
        num_in_flight=1,
        num_running=len(running),
        num_waiting=0,
        num_blocked=0,
        num_preempted=0,
        running=running,
        waiting=[],
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=32,
        block_size=4,
        num_blocks=num_blocks,
        num_free_blocks=num_blocks // 2,
        num_cached_blocks=1,
        kv_usage=0.5,
        blocks=bytes(index % 4 for index in range(0, num_blocks, stride)),
        blocks_stride=stride,
        prefix_queries=100,
        prefix_hits=50,
        degraded=degraded,
    )


def test_snapshots_of_replicas_are_added_up():
    merged = merge_snapshots([snapshot(a=3.0, b=1.0), snapshot(num_blocks=6, c=2.0, degraded="slow")], max_requests=2)
    assert [(one.id, one.engine) for one in merged.running] == [("a", 0), ("c", 1)]
    assert (merged.num_running, merged.steps, merged.max_num_seqs, merged.prefix_hits) == (3, 20, 16, 100)
    assert (merged.num_blocks, merged.num_free_blocks, merged.kv_usage) == (10, 5, 0.5)
    assert merged.blocks == bytes([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    assert [(one.engine, one.works, one.num_running) for one in merged.replicas] == [(0, True, 2), (1, True, 1)]
    assert merged.degraded == "replica 1: slow"


def test_a_replica_without_an_answer_is_said_to_be_down():
    merged = merge_snapshots([None, snapshot(a=3.0)])
    assert [one.engine for one in merged.running] == [1]
    assert [one.works for one in merged.replicas] == [False, True]
    assert merged.degraded == "replica 0 is not running"


def test_block_maps_of_different_strides_are_brought_together():
    merged = merge_snapshots([snapshot(num_blocks=12, stride=2), snapshot(num_blocks=9, stride=3)])
    assert merged.blocks_stride == 3
    # Blocks 0, 3, 6, 9 of the first, of whose map every second is known: 0, 2, 6, 8.
    assert merged.blocks == bytes([0, 2, 2, 0]) + bytes([0, 3, 2])
