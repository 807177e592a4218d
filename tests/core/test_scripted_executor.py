"""The fakes for plugin authors: the checked worker refuses what a real worker could not carry out."""

import pytest

from interlace.interfaces.executor import ExecutorEvent
from interlace.kv.specs import KVCacheConfig, KVGroup
from interlace.messages import Admission, BlockDelta, EngineRequest, SamplingParams, StepPlan
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.testing import overhead
from interlace.testing.checked_worker import CheckedWorker, PlanError, generate_alone
from interlace.testing.executor import ScriptedExecutor, scripted_spec
from interlace.testing.harness import EngineHarness

SIZE = 4


def worker(*windows, content_root=None) -> CheckedWorker:
    groups = tuple(KVGroup("window" if w else "full", w, (i,)) for i, w in enumerate(windows or (0,)))
    return CheckedWorker(
        KVCacheConfig(block_size=SIZE, num_blocks=12, groups=groups, bytes_per_block=1),
        max_num_seqs=3,
        max_model_len=32,
        next_token=lambda tokens, admission: sum(tokens) % 50,
        content_root=content_root,
    )


def admission(slot=0, tokens=(1, 2, 3, 4, 5), cached=0, seed=0) -> Admission:
    return Admission(slot, 1, list(tokens), len(tokens), cached, SamplingParams(), seed, 0, ())


def plan(step_id=0, rows=(), blocks=(), admitted=(), finished=(), preempted=()) -> StepPlan:
    """`rows` are (slot, tokens, sample); `blocks` are, per KV group, {slot: block ids}."""
    deltas = [
        BlockDelta(
            list(group), [len(ids) for ids in group.values()], [block for ids in group.values() for block in ids]
        )
        for group in blocks
    ]
    return StepPlan(
        step_id=step_id,
        slots=[row[0] for row in rows],
        num_tokens=[row[1] for row in rows],
        sample=[row[2] for row in rows],
        blocks=deltas,
        admitted=list(admitted),
        finished=list(finished),
        preempted=list(preempted),
    )


def carry_out(target, *plans):
    results = []
    for one in plans:
        target.apply(one)
        results.append(target.compute(one, {}))
    return results


GOOD = plan(0, [(0, 5, True)], [{0: [1, 2]}], [admission()])


def test_a_good_plan_gives_tokens():
    [first, second] = carry_out(worker(), GOOD, plan(1, [(0, 1, True)], [{}]))
    assert (first.counts, first.token_ids) == ([1], [15])
    assert second.token_ids == [30]


REFUSED = {
    "slot 1 is released, but nobody holds it": plan(1, finished=[1], blocks=[{}]),
    "slot 0 is given to a second request": plan(1, blocks=[{}], admitted=[admission()]),
    "there is no slot 3": plan(1, blocks=[{}], admitted=[admission(3)]),
    "the last one is always to be computed": plan(1, blocks=[{}], admitted=[admission(1, cached=5)]),
    "0 block deltas for 1 KV groups": plan(1),
    "blocks for slot 2, which nobody holds": plan(1, blocks=[{2: [4]}]),
    "there are 12": plan(1, blocks=[{0: [12]}]),
    "a slot has two rows": plan(1, [(0, 1, True), (0, 1, True)], [{}]),
    "a row for slot 1, which nobody holds": plan(1, [(1, 1, True)], [{}]),
    "a row of 0 tokens": plan(1, [(0, 0, True)], [{}]),
    "has 6 tokens and shall compute 7": plan(1, [(0, 2, True)], [{}]),
    "shall not sample at 6 of 6": plan(1, [(0, 1, False)], [{}]),
    "has 1 blocks for 5 tokens": plan(1, [(1, 5, True)], [{1: [3]}], [admission(1)]),
    "into the null block": plan(1, [(1, 5, True)], [{1: [3, 0]}], [admission(1)]),
    "both write block 2": plan(1, [(0, 1, True), (1, 5, True)], [{1: [3, 2]}], [admission(1)]),
    "reads positions 0 to 3 from block 3": plan(1, [(1, 1, True)], [{1: [3, 4]}], [admission(1, cached=4)]),
    "reads positions 0 to 3 from block 1": plan(
        1, [(1, 1, True)], [{1: [1, 4]}], [admission(1, tokens=(9, 2, 3, 4, 5), cached=4)]
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_bad_plan_is_refused_with_its_reason(reason):
    target = worker()
    carry_out(target, GOOD)
    with pytest.raises(PlanError, match="step 1: ") as caught:
        carry_out(target, REFUSED[reason])
    assert reason in str(caught.value)


def test_a_true_prefix_hit_is_read():
    target = worker()
    carry_out(target, GOOD, plan(1, [(1, 1, True)], [{1: [1, 4]}], [admission(1, cached=4)]))


def test_a_hit_on_content_of_another_root_is_refused():
    target = worker(content_root=lambda one: one.seed)
    carry_out(target, GOOD)
    with pytest.raises(PlanError, match="does not hold them"):
        carry_out(target, plan(1, [(1, 1, True)], [{1: [1, 4]}], [admission(1, cached=4, seed=9)]))


def test_a_block_written_by_another_kv_group_is_no_hit():
    target = worker(0, 8)
    carry_out(target, plan(0, [(0, 5, True)], [{0: [1, 2]}, {0: [3, 4]}], [admission()]))
    with pytest.raises(PlanError, match="from block 3 "):
        carry_out(target, plan(1, [(1, 1, True)], [{1: [3, 5]}, {1: [3, 6]}], [admission(1, cached=4)]))


def test_a_block_taken_away_too_early_is_noticed_by_its_reader():
    target = worker()
    carry_out(target, GOOD, plan(1, [(1, 5, True)], [{1: [1, 4]}], [admission(1, tokens=(9, 9, 9, 9, 9))]))
    with pytest.raises(PlanError, match="slot 0 reads positions 0 to 3 from block 1"):
        carry_out(target, plan(2, [(0, 1, True)], [{}]))


def test_a_window_reads_only_what_it_can_see():
    target = worker(4)
    tokens = list(range(12))
    carry_out(
        target,
        plan(0, [(0, 8, False)], [{0: [1, 2]}], [admission(tokens=tokens)]),
        plan(1, [(1, 5, True)], [{1: [1, 4]}], [admission(1)]),  # block 1 left the window
        plan(2, [(0, 4, True)], [{0: [3]}]),
    )


def test_a_step_that_never_ran_leaves_its_slots_uncertain():
    target = worker()
    carry_out(target, GOOD)
    target.skip(plan(1, finished=[0], blocks=[{}], admitted=[admission(1)]))
    assert target.occupied == set()
    carry_out(target, plan(2, [(0, 5, True)], [{0: [5, 6]}], [admission()]))


def request(**fields) -> EngineRequest:
    params = SamplingParams(**{key: fields.pop(key) for key in list(fields) if key in SamplingParams.__struct_fields__})
    return EngineRequest(id="a", prompt_token_ids=[1, 2], params=params, arrival_time=0.0, seed=0, **fields)


@pytest.mark.parametrize(
    ("fields", "output", "reason"),
    [
        ({"max_tokens": 3}, [3, 4, 5], "length"),
        ({"max_tokens": None}, [3, 4, 5, 6, 7, 8], "length"),
        ({"stop_token_ids": [4]}, [3, 4], "stop"),
        ({"eos_token_ids": (4,)}, [3, 4], "stop"),
        ({"eos_token_ids": (4,), "ignore_eos": True, "max_tokens": 3}, [3, 4, 5], "length"),
        ({"stop_token_ids": [4], "min_tokens": 2, "max_tokens": 3}, [3, 5, 5], "length"),
    ],
)
def test_what_a_request_gives_alone(fields, output, reason):
    assert generate_alone(request(**fields), lambda tokens, _: len(tokens) + 1, 8) == (output, reason)


class TestExecutor:
    def make(self, **options):
        executor = ScriptedExecutor(ScriptedExecutor.Options(**options))
        events = []
        executor.start(scripted_spec("x:y", **options), events.append)
        assert events == [ExecutorEvent("progress", "nothing to load", {"done": 1, "total": 1})]
        return executor

    def test_it_takes_as_many_steps_as_it_says(self):
        executor = self.make(manual=True, max_in_flight=2)
        executor.submit(plan(0, blocks=[{}]))
        executor.submit(plan(1, blocks=[{}]))
        with pytest.raises(PlanError, match="one more than 2 under way"):
            executor.submit(plan(2, blocks=[{}]))

    def test_it_wants_steps_in_order(self):
        executor = self.make(manual=True, max_in_flight=2)
        executor.submit(plan(1, blocks=[{}]))
        with pytest.raises(PlanError, match="step 0 comes after step 1"):
            executor.submit(plan(0, blocks=[{}]))

    def test_without_feeding_it_refuses_a_row_whose_token_it_cannot_know(self):
        executor = self.make(manual=True, max_in_flight=2, feeds_tokens=False)
        executor.submit(GOOD)
        with pytest.raises(PlanError, match=r"slots \[0\] still have a sample under way"):
            executor.submit(plan(1, [(0, 1, True)], [{}]))

    def test_a_failure_fails_what_was_submitted_after_it(self):
        executor = self.make(manual=True, max_in_flight=3, fail_steps=(0,))
        futures = [executor.submit(plan(step, blocks=[{}])) for step in range(3)]
        executor.run_next()
        assert [str(future.exception()) for future in futures] == [
            "scripted failure of step 0",
            "step 0, before this one, failed",
            "step 0, before this one, failed",
        ]
        executor.submit(plan(3, blocks=[{}]))

    def test_an_empty_plan_is_legal(self):
        executor = self.make()
        assert executor.submit(plan(0, blocks=[{}])).result().counts == []

    def test_unknown_operations_are_refused(self):
        with pytest.raises(ValueError, match="offers no operation 'dance'"):
            self.make().control("dance")

    def test_it_may_be_shut_down_at_any_time(self):
        ScriptedExecutor(ScriptedExecutor.Options()).shutdown()
        executor = self.make(delay_s=0.001)
        executor.shutdown()
        executor.shutdown()


class TestHarness:
    def test_the_example_of_its_documentation(self):
        harness = EngineHarness(Fcfs(Fcfs.Options()), num_blocks=32)
        first = harness.add([1, 2, 3], max_tokens=5)
        second = harness.add([1, 2, 3, 4], max_tokens=5, priority=-1)
        outputs = harness.run()
        assert set(outputs) == {first, second}
        assert harness.records[second].first_step <= harness.records[first].first_step

    def test_a_request_that_never_ends_is_an_error(self):
        harness = EngineHarness(Fcfs(Fcfs.Options()))
        harness.add([1], blocked_on=("grammar",))
        with pytest.raises(AssertionError, match="requests never finished"):
            harness.run(max_steps=20)

    def test_a_wrong_output_is_an_error(self):
        harness = EngineHarness(Fcfs(Fcfs.Options()))
        harness.add([1], id="a", max_tokens=3)
        harness.step()
        harness.records["a"].tokens[0] += 1
        with pytest.raises(AssertionError, match="alone it has"):
            harness.run()


class TestOverhead:
    def test_it_measures_and_prints(self, capsys, monkeypatch):
        monkeypatch.setattr(overhead, "BATCHES", (1, 4))
        monkeypatch.setattr(
            overhead, "added_seconds", lambda *a, real=overhead.added_seconds, **k: real(*a, count=20, **k)
        )
        overhead.main(["--repeat", "1"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 6
        assert all("µs a step" in line for line in lines[:4])
        assert "512 shared" in lines[-1]

    def test_the_engine_adds_little_to_a_step(self):
        """Far above what is measured on an idle machine, so that it fails on a mistake and not on a neighbour."""
        clock = overhead.MonotonicClock()
        best = min(overhead.step_seconds(lambda: Fcfs(Fcfs.Options()), 256, clock, steps=50) for _ in range(5))
        assert best < 3e-3
