"""Pipeline stages: decoding requests are dealt out over the steps under way, so that no stage waits for work."""

import random

import pytest

from interlace.interfaces.scheduler import Outcome
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.plugins.schedulers.priority import Priority
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler

STAGES = pytest.mark.parametrize("stages", [2, 3, 4])


def harness(stages, scheduler=None, **options) -> EngineHarness:
    limits = options.pop("limits", SchedulerLimits(watermark=0.0))
    options = {"max_in_flight": stages, "num_stages": stages, "feeds_tokens": False, "num_blocks": 256} | options
    return EngineHarness(scheduler or Fcfs(Fcfs.Options()), limits=limits, **options)


def fill(engine) -> list[list[str]]:
    """Plan as many steps as can be under way; the requests of each one that is."""
    while len(engine.in_flight) < engine.info.max_in_flight and engine.plan() is not None:
        pass
    return [step.request_ids for step in engine.in_flight]


def decoding(stages, count, **options) -> EngineHarness:
    """An engine in which `count` requests have their first token, and nothing is under way."""
    engine = harness(stages, **options)
    for number in range(count):
        engine.add([number, 1, 2], id=f"r{number}", max_tokens=40)
    while engine.plan() is not None:
        pass
    while engine.in_flight:
        engine.complete()
    return engine


@STAGES
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_steps_under_way_have_equal_parts_of_the_requests(stages, count):
    engine = decoding(stages, count)
    under_way = fill(engine)
    assert len(under_way) == min(stages, count)
    everybody = [request for step in under_way for request in step]
    assert sorted(everybody) == sorted({*everybody}) and len(everybody) == count
    sizes = [len(step) for step in under_way]
    assert max(sizes) - min(sizes) <= 1
    engine.run()


@STAGES
def test_many_that_arrive_together_are_soon_dealt_out(stages):
    engine = decoding(stages, stages)
    fill(engine)
    for number in range(12 * stages):
        engine.add([100 + number], max_tokens=100)
    for _ in range(3 * stages):
        fill(engine)
        engine.complete()
    assert [len(step) for step in fill(engine)] == [13] * stages
    engine.run()


@STAGES
def test_without_stages_a_step_takes_everybody(stages):
    engine = decoding(stages, 6, num_stages=1)
    assert [len(step) for step in fill(engine)] == [6]


@STAGES
@pytest.mark.parametrize("policy", [Fcfs, Priority])
def test_all_go_on_alike_and_no_stage_waits(stages, policy):
    engine = decoding(stages, 9, scheduler=policy(policy.Options()))
    names = [f"r{number}" for number in range(9)]
    for _ in range(30 * stages):
        assert len(fill(engine)) == stages
        engine.complete()
        counts = [len(engine.tokens(name)) for name in names]
        assert max(counts) - min(counts) <= 1
    engine.run()


@STAGES
def test_nobody_waits_long_while_others_come_and_go(stages):
    """Whoever decodes is in one of the next `stages` + 1 plans."""
    source = random.Random(10 * stages)
    engine = harness(stages, limits=SchedulerLimits(max_num_batched_tokens=16, max_num_seqs=12, watermark=0.0))
    missed: dict[str, int] = {}
    for step in range(300):
        if source.random() < 0.4 and step < 250:
            engine.add([step % 200, 1, *range(source.randint(0, 20))], max_tokens=source.randint(1, 30))
        ready = {state.id for state in engine.core.queues.running if not (state.is_prefilling or state.in_flight)}
        if len(engine.in_flight) == stages or engine.plan() is None:
            if engine.in_flight:
                engine.complete()
            continue
        planned = {*engine.in_flight[-1].request_ids}
        missed = {name: missed.get(name, 0) + 1 for name in ready - planned}
        assert max(missed.values(), default=0) <= stages
    engine.run()


def test_chunks_of_one_prompt_are_in_successive_steps_beside_the_decodes():
    limits = SchedulerLimits(max_num_batched_tokens=8, watermark=0.0)
    engine = decoding(2, 4, limits=limits)
    engine.add(range(100, 130), id="long", max_tokens=3)
    assert fill(engine) == [["r0", "r1", "long"], ["r2", "r3", "long"]]
    assert [plan.num_tokens for plan in engine.plans[-2:]] == [[1, 1, 6], [1, 1, 6]]
    assert engine.plans[-1].sample == [True, True, False]
    engine.run()


def test_a_policy_that_asks_for_each_request_is_told_that_the_part_is_full():
    engine = decoding(2, 4)
    log = []

    def plan(step):
        requests = step.running
        log.append([step.fits(request) for request in requests])
        log.append([step.schedule(request) for request in requests])

    engine.core._policy.policy = ScriptedScheduler(plan)
    fill(engine)
    ok, later = Outcome.OK, Outcome.NOT_READY
    assert log == [[True] * 4, [ok, ok, later, later], [False, False, True, True], [later, later, ok, ok]]
    assert not engine.core.degraded
    engine.run()


def test_a_full_part_leaves_room_for_prefills_that_are_behind_it():
    """The first request in order prefills last here; the cap on decodes must not end the search for prefills."""
    engine = harness(2, limits=SchedulerLimits(max_num_batched_tokens=6, watermark=0.0))
    for number in range(3):
        engine.add([number], id=f"r{number}", max_tokens=20)
    engine.step()
    engine.add(range(100, 140), id="long", max_tokens=2)
    for _ in range(3):
        engine.step()
    assert all("long" in step for step in fill(engine))
    engine.run()
