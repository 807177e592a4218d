"""Several steps under way: late tokens, stops, aborts, preemptions and failures seen late."""

import pytest

from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler

BOTH = pytest.mark.parametrize("max_in_flight", [2, 3])
FEEDING = pytest.mark.parametrize("feeds_tokens", [True, False])


def harness(max_in_flight=2, scheduler=None, **options) -> EngineHarness:
    limits = options.pop("limits", SchedulerLimits(watermark=0.0))
    return EngineHarness(scheduler or Fcfs(Fcfs.Options()), limits=limits, max_in_flight=max_in_flight, **options)


def fill(engine) -> int:
    """Plan until nothing more fits; the number of steps under way."""
    while engine.plan() is not None:
        pass
    return len(engine.in_flight)


@BOTH
def test_steps_are_planned_before_their_tokens_are_known(max_in_flight):
    engine = harness(max_in_flight)
    engine.add([1, 2, 3], id="a", max_tokens=10)
    assert fill(engine) == max_in_flight
    state = engine.state("a")
    assert (state.num_known, state.samples_in_flight) == (3, max_in_flight)
    assert state.num_planned == state.num_known + max_in_flight - 1
    engine.run()
    assert len(engine.plans) == 10


@BOTH
def test_without_feeding_a_request_waits_for_its_sample(max_in_flight):
    engine = harness(max_in_flight, feeds_tokens=False)
    engine.add([1, 2, 3], id="a", max_tokens=4)
    assert fill(engine) == 1
    engine.add([4], id="b", max_tokens=4)
    assert fill(engine) == 2, "others may use the time"
    engine.run()


@BOTH
def test_chunks_of_one_prompt_are_under_way_together(max_in_flight):
    engine = harness(max_in_flight, feeds_tokens=False, limits=SchedulerLimits(max_num_batched_tokens=4))
    engine.add(range(12), id="a", max_tokens=1)
    assert fill(engine) == max_in_flight
    assert [plan.sample for plan in engine.plans] == [[False], [False], [True]][:max_in_flight]
    engine.run()


@BOTH
def test_a_stop_is_seen_late_and_the_tokens_after_it_are_dropped(max_in_flight):
    engine = harness(max_in_flight)
    engine.add([1, 2, 3], id="probe", max_tokens=4)
    stop = engine.run()["probe"][-1]
    engine.add([1, 2, 3], id="a", max_tokens=50, stop_token_ids=[stop])
    before = len(engine.plans)
    engine.run()
    record = engine.records["a"]
    assert (record.reason, record.tokens[-1]) == ("stop", stop)
    assert len(engine.plans) - before == len(record.tokens) + max_in_flight - 1


@BOTH
def test_the_length_limit_is_known_beforehand_and_nothing_is_computed_beyond_it(max_in_flight):
    engine = harness(max_in_flight)
    engine.add([1, 2, 3], id="a", max_tokens=4)
    engine.run()
    assert len(engine.plans) == 4


@BOTH
def test_a_slot_left_by_a_late_stop_is_given_on_at_once(max_in_flight):
    engine = harness(max_in_flight, limits=SchedulerLimits(max_num_seqs=1))
    engine.add([1, 2, 3], id="probe", max_tokens=4)
    stop = engine.run()["probe"][-1]
    engine.add([1, 2, 3], id="a", max_tokens=50, stop_token_ids=[stop])
    engine.add([7, 8, 9], id="b", max_tokens=5)
    engine.run()
    assert engine.records["b"].tokens == engine.expected("b")[0], "not the late tokens of the slot's last owner"


@BOTH
@FEEDING
def test_an_abort_frees_blocks_at_once_and_drops_what_is_under_way(max_in_flight, feeds_tokens):
    engine = harness(max_in_flight, feeds_tokens=feeds_tokens)
    engine.add(range(9), id="a", max_tokens=20)
    engine.add(range(30, 34), id="b", max_tokens=9)
    fill(engine)
    engine.abort("a")
    assert engine.core.kv.pool.num_usable - engine.core.kv.pool.num_free == len(engine.state("b").blocks[0])
    engine.run()
    assert (engine.records["a"].reason, engine.records["a"].tokens) == ("abort", [])


@BOTH
def test_blocks_of_an_aborted_request_serve_another_while_its_steps_are_under_way(max_in_flight):
    engine = harness(max_in_flight, num_blocks=5)
    engine.add(range(12), id="a", max_tokens=20)
    fill(engine)
    engine.abort("a")
    engine.add(range(50, 62), id="b", max_tokens=3)
    engine.complete()
    engine.run()
    assert engine.records["b"].tokens == engine.expected("b")[0]


@BOTH
def test_a_prefix_of_an_aborted_request_is_still_good(max_in_flight):
    engine = harness(max_in_flight)
    engine.add(range(9), id="a")
    engine.plan()
    engine.abort("a")
    engine.add(range(9), id="b", max_tokens=2)
    engine.run()
    assert engine.records["b"].cached_tokens == 8


@BOTH
@FEEDING
def test_a_preemption_drops_the_sample_under_way_and_makes_it_again(max_in_flight, feeds_tokens):
    turns = []

    def plan(step):
        turns.append(1)
        step.continue_running()
        if len(turns) == 4:
            for request in step.running:
                step.preempt(request)
        for request in step.waiting:
            step.schedule(request)

    engine = harness(max_in_flight, ScriptedScheduler(plan), feeds_tokens=feeds_tokens)
    engine.add(range(9), id="a", max_tokens=12)
    engine.run()
    assert engine.records["a"].finish.num_preemptions == 1
    assert engine.records["a"].tokens == engine.expected("a")[0]


@BOTH
@pytest.mark.parametrize("ran", [True, False], ids=["took effect", "had no effect"])
def test_a_failed_step_fails_its_successors_and_only_their_requests(max_in_flight, ran):
    limits = SchedulerLimits(max_num_batched_tokens=4)
    engine = harness(max_in_flight, limits=limits, fail_steps=(1,), failed_steps_run=ran)
    names = set("abcdefgh")
    for name in sorted(names):
        engine.add([ord(name)] * 4, id=name, max_tokens=3)
    engine.plan()
    engine.complete()
    assert fill(engine) == max_in_flight
    under_way = {name for step in engine.in_flight for name in step.request_ids}
    assert under_way < names
    engine.complete()
    assert {name for name, record in engine.records.items() if record.error_code == "step_failed"} == under_way
    assert not engine.in_flight
    engine.run()
    for name in names - under_way:
        assert engine.records[name].reason == "length"


@BOTH
def test_a_prefix_hit_on_a_step_that_fails_fails_with_it(max_in_flight):
    engine = harness(max_in_flight, fail_steps=(0,), failed_steps_run=False)
    engine.add(range(9), id="a")
    engine.plan()
    engine.add(range(9), id="b")
    engine.plan()
    assert engine.plans[-1].admitted[0].num_cached_tokens == 8
    engine.complete()
    assert {record.error_code for record in engine.records.values()} == {"step_failed"}
    assert engine.core.kv.pool.num_cached == 0
    engine.add(range(9), id="c", max_tokens=2)
    engine.run()
    assert engine.records["c"].cached_tokens == 0


def test_a_preempted_request_does_not_fail_with_the_step_it_left():
    turns = []

    def plan(step):
        turns.append(1)
        if len(turns) == 2:
            for request in step.running:
                step.preempt(request)
            return
        step.continue_running()
        for request in step.waiting:
            step.schedule(request)

    engine = harness(2, ScriptedScheduler(plan), fail_steps=(0,))
    engine.add(range(9), id="a", max_tokens=3)
    engine.plan()
    assert engine.plan() is None
    engine.complete()
    assert engine.records["a"].finish is None
    engine.run()
    assert engine.records["a"].reason == "length"


@BOTH
def test_alone_and_short_waits_for_the_sample_that_may_be_the_last(max_in_flight):
    engine = harness(max_in_flight, num_blocks=3)
    engine.add(range(7), id="probe", max_tokens=2)
    first, second = engine.run()["probe"]
    engine.add(range(7), id="a", max_tokens=9, stop_token_ids=[second])
    engine.run()
    assert engine.records["a"].reason == "stop", f"{first} fits, {second} is the end: no third block is needed"


@BOTH
def test_a_row_that_fails_takes_its_later_steps_with_it(max_in_flight):
    engine = harness(max_in_flight)
    engine.executor.row_error = lambda plan, row: "lost" if plan.step_id == 0 and row == 0 else None
    engine.add([1], id="a", max_tokens=9)
    engine.add([2], id="b", max_tokens=9)
    engine.run()
    assert engine.records["a"].finish.error == "lost"
    assert engine.records["b"].reason == "length"


@BOTH
def test_a_block_filled_before_its_last_token_was_known_is_published_when_it_is(max_in_flight):
    engine = harness(max_in_flight)
    engine.add(range(6), id="a", max_tokens=20)
    while len(engine.tokens("a")) < 12:
        engine.step()
    prompt = [*range(6), *engine.tokens("a")]
    engine.add(prompt, id="b", max_tokens=1)
    engine.run()
    assert engine.records["b"].cached_tokens >= 12


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@FEEDING
def test_outputs_do_not_depend_on_the_steps_under_way(max_in_flight, feeds_tokens):
    limits = SchedulerLimits(max_num_batched_tokens=11, max_num_seqs=3)
    engine = harness(max_in_flight, feeds_tokens=feeds_tokens, num_blocks=14, limits=limits)
    for index in range(8):
        engine.add(range(index, index + 9), id=f"r{index}", max_tokens=8, stop_token_ids=list(range(0, 256, 9)))
    engine.run()
    assert len(engine.records) == 8
