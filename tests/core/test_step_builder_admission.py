"""`StepBuilder`: the admission rule, one test for each of its parts."""

from interlace.interfaces.scheduler import Outcome
from interlace.spec import SchedulerLimits
from interlace.testing.harness import EngineHarness, ScriptedScheduler


def schedule_all(step):
    """Running requests, then waiting ones; the outcome of each waiting one."""
    step.continue_running()
    return {request.id: step.schedule(request) for request in step.waiting}


def harness(plan=schedule_all, **options) -> EngineHarness:
    limits = {key: options.pop(key) for key in list(options) if key in SchedulerLimits.__struct_fields__}
    return EngineHarness(ScriptedScheduler(plan), limits=SchedulerLimits(**({"watermark": 0.0} | limits)), **options)


def outcomes(engine) -> dict:
    """Plan one step; what `schedule_all` returned."""
    engine.plan()
    return engine.core._policy.policy.log[-1]


class TestAdmission:
    """`num_blocks` counts the null block; blocks hold four tokens."""

    def test_it_needs_blocks_for_the_whole_known_length(self):
        engine = harness(num_blocks=6, long_prefill_token_threshold=4)
        engine.add(range(17), id="fits")
        assert outcomes(engine) == {"fits": Outcome.OK}
        engine = harness(num_blocks=6, long_prefill_token_threshold=4)
        engine.add(range(4), id="first")
        engine.add(range(40, 57), id="long")
        assert outcomes(engine) == {"first": Outcome.OK, "long": Outcome.BLOCKS}

    def test_it_leaves_what_running_prefills_still_need(self):
        engine = harness(num_blocks=11, long_prefill_token_threshold=4)
        engine.add(range(24), id="a")  # one block now, five to come
        engine.add(range(40, 57), id="five")
        engine.add(range(60, 76), id="four")
        assert outcomes(engine) == {"a": Outcome.OK, "five": Outcome.BLOCKS, "four": Outcome.OK}

    def test_it_leaves_the_watermark_free_unless_nothing_runs(self):
        engine = harness(num_blocks=11, watermark=0.2)
        engine.add(range(36), id="alone")  # nine of ten blocks
        assert outcomes(engine) == {"alone": Outcome.OK}
        engine = harness(num_blocks=11, watermark=0.2)
        engine.add(range(8), id="a")
        engine.add(range(40, 68), id="seven")
        engine.add(range(70, 94), id="six")
        assert outcomes(engine) == {"a": Outcome.OK, "seven": Outcome.BLOCKS, "six": Outcome.OK}

    def test_without_reserve_full_prompt_the_first_chunk_is_enough(self):
        engine = harness(num_blocks=6, long_prefill_token_threshold=4, reserve_full_prompt=False)
        engine.add(range(8), id="a")
        engine.add(range(40, 57), id="long")
        assert outcomes(engine) == {"a": Outcome.OK, "long": Outcome.OK}

    def test_free_hits_count_as_blocks_needed(self):
        engine = harness(num_blocks=6)
        engine.add(range(17), id="a", max_tokens=1)
        engine.run()
        engine.add(range(50, 58), id="b")
        engine.add(range(17), id="again")  # four hits, all free, and one more; three are left
        assert outcomes(engine) == {"b": Outcome.OK, "again": Outcome.BLOCKS}

    def test_after_a_preemption_for_blocks_nothing_waiting_is_admitted(self):
        def plan(step):
            for request in step.continue_running():
                while step.schedule(request) is Outcome.BLOCKS:
                    step.preempt(step.running[-1])
            return {request.id: step.schedule(request) for request in step.waiting}

        engine = harness(plan, num_blocks=6)
        engine.add(range(8), id="a")
        engine.add(range(20, 28), id="b")
        engine.step()  # four of five blocks, and both need another one
        engine.add([1], id="late")
        assert outcomes(engine) == {"late": Outcome.BLOCKS}
        assert engine.plans[-1].preempted
        assert engine.core.kv.pool.num_free == 2, "there would be room, but not for long"

    def test_after_a_preemption_for_other_reasons_admission_goes_on(self):
        def plan(step):
            for request in step.running:
                step.preempt(request)
            return {request.id: step.schedule(request) for request in step.waiting}

        engine = harness(plan)
        engine.add(range(8), id="a")
        engine.step()
        engine.add([1], id="late")
        assert outcomes(engine) == {"late": Outcome.OK}

    def test_alone_and_too_large_ends_with_kv_capacity(self):
        engine = harness(num_blocks=4)
        engine.add(range(13), id="large")
        assert outcomes(engine) == {"large": Outcome.DONE}
        assert engine.records["large"].error_code == "kv_capacity"
        assert "13 tokens" in engine.records["large"].finish.error
        assert "raise cache.memory" in engine.records["large"].finish.error
        engine.check_end()

    def test_alone_and_grown_too_large_ends_with_kv_capacity(self):
        engine = harness(num_blocks=4)
        engine.add(range(9), id="grows", max_tokens=20)
        engine.run()
        record = engine.records["grows"]
        assert record.error_code == "kv_capacity"
        assert record.tokens == engine.expected("grows")[0][:4], "what was generated is the client's"

    def test_not_alone_it_waits_instead(self):
        engine = harness(num_blocks=4)
        engine.add(range(4), id="a", max_tokens=2)
        engine.add(range(40, 53), id="large")
        assert outcomes(engine) == {"a": Outcome.OK, "large": Outcome.BLOCKS}
        engine.run()
        assert engine.records["a"].reason == "length"
        assert engine.records["large"].error_code == "kv_capacity"

    def test_a_pin_is_a_reason_to_wait(self):
        engine = harness(num_blocks=4)
        [block] = engine.core.kv.pool.allocate(1)
        engine.core.kv.pool.pin(block)
        engine.core.kv.pool.release([block])
        engine.add(range(12), id="a", max_tokens=1)
        assert outcomes(engine) == {"a": Outcome.BLOCKS}
        engine.core.kv.pool.unpin(block)
        assert outcomes(engine) == {"a": Outcome.OK}
