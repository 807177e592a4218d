"""What an engine shows of itself between two steps, and what it costs."""

import sys
import threading

import msgspec
import pytest

from interlace.assemble import make_client
from interlace.clock import MonotonicClock
from interlace.engine.snapshot import EngineSnapshot, describe_state, take_snapshot
from interlace.messages import EngineRequest, SamplingParams
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.executor import scripted_spec
from interlace.testing.harness import EngineHarness

FREE, CACHED, ACTIVE, SHARED = range(4)


def harness(**options) -> EngineHarness:
    return EngineHarness(Fcfs(Fcfs.Options()), **options)


def snapshot(engine: EngineHarness, **limits) -> EngineSnapshot:
    return take_snapshot(engine.core, engine.clock.now(), 0, **limits)


def test_requests_are_shown_with_their_progress():
    engine = harness(limits=SchedulerLimits(max_num_seqs=1))
    engine.add([1, 2, 3], id="a", max_tokens=5, priority=-2)
    engine.add([4, 5], id="b", max_tokens=7)
    engine.add([6], id="c", blocked_on=("grammar",))
    engine.clock.advance(0.5)
    engine.step()
    engine.step()
    found = snapshot(engine)
    assert (found.num_running, found.num_waiting, found.num_blocked, found.num_preempted) == (1, 2, 1, 0)
    [a] = found.running
    assert (a.id, a.num_prompt_tokens, a.num_computed_tokens, a.num_output_tokens) == ("a", 3, 4, 2)
    assert (a.max_tokens, a.priority, a.age) == (5, -2, pytest.approx(0.52))
    assert [(request.id, request.blocked_on) for request in found.waiting] == [("b", ()), ("c", ("grammar",))]
    assert (found.max_num_seqs, found.max_model_len, found.block_size, found.num_blocks) == (1, 256, 4, 63)


def test_the_block_map_tells_free_cached_active_and_shared_apart():
    engine = harness(num_blocks=16)
    engine.add(list(range(8)), id="first", max_tokens=2)
    engine.run()
    assert sorted(snapshot(engine).blocks) == [FREE] * 13 + [CACHED] * 2
    for id in ("a", "b"):
        engine.add([*range(8), 9], id=id, max_tokens=9)
    engine.step()
    found = snapshot(engine)
    assert sorted(found.blocks) == [FREE] * 11 + [ACTIVE] * 2 + [SHARED] * 2
    assert found.num_free_blocks == 11 and found.kv_usage == pytest.approx(4 / 15)
    assert (found.prefix_queries, found.prefix_hits) == (26, 16)


def test_large_things_are_cut_to_size():
    engine = harness(num_blocks=1001, limits=SchedulerLimits(max_num_seqs=2))
    for number in range(9):
        engine.add([number], id=f"r{number}", max_tokens=5)
    engine.step()
    found = snapshot(engine, max_requests=3, max_blocks=300)
    assert [request.id for request in found.waiting] == ["r2", "r3", "r4"]
    assert (len(found.running), found.num_waiting) == (2, 7)
    assert (found.blocks_stride, len(found.blocks)) == (4, 250)
    assert found.blocks[0] == ACTIVE


def test_it_makes_a_few_calls_per_request_and_none_per_block():
    engine = harness(num_blocks=10_001, limits=SchedulerLimits(max_num_seqs=256))
    for number in range(256):
        engine.add([number], max_tokens=5)
    engine.step()
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        snapshot(engine)
    finally:
        sys.setprofile(None)
    assert len(calls) < 256 * 12


def test_its_text_is_for_people_and_never_raises():
    engine = harness()
    for number in range(3):
        engine.add([1, 2, 3], id=f"r{number}", max_tokens=5)
    engine.step()
    text = describe_state(engine.core, engine.clock.now(), 1, max_requests=2)
    assert text.splitlines() == [
        "1 steps completed, 0 under way",
        "KV cache: 3 of 63 blocks held, 0 cached",
        "running: 3",
        "  r0: prompt 3, computed 3, output 1 of 5 tokens, 0.0 s old",
        "  r1: prompt 3, computed 3, output 1 of 5 tokens, 0.0 s old",
        "  and 1 more",
        "waiting: 0",
    ]
    engine.core.queues.running = None
    assert describe_state(engine.core, 0.0, 1).startswith("the scheduler's state cannot be read: TypeError")


@pytest.mark.parametrize("process", ["inline", "subprocess"])
def test_both_transports_bring_it(process):
    spec = scripted_spec("interlace.plugins.schedulers.fcfs:Fcfs", delay_s=0.02)
    client = make_client(spec, process, MonotonicClock())
    started = threading.Event()
    client.start(lambda output: started.set(), print)
    try:
        params = SamplingParams(max_tokens=100)
        client.add([EngineRequest(id="a", prompt_token_ids=[1, 2], params=params, arrival_time=0.0, seed=0)])
        assert started.wait(10)
        found = msgspec.convert(client.control("snapshot", max_blocks=10), EngineSnapshot)
        assert [request.id for request in found.running] == ["a"] and found.steps >= 1
        assert (found.blocks_stride, found.blocks[0]) == (7, ACTIVE)
    finally:
        client.shutdown()
