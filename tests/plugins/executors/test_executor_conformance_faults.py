"""The suite for executors is itself tested: a threaded one passes, and each broken one below fails where it should."""

from __future__ import annotations

import queue
import random
import threading
from concurrent.futures import Future

import msgspec
import pytest

from interlace.plugins.executors.uniprocess import UniprocessExecutor
from interlace.testing import ExecutorConformance
from interlace.testing.conformance import failures
from interlace.testing.executor_suite import add_traffic


class Threaded(UniprocessExecutor):
    """One worker on a thread of its own, two steps under way: good, and easily broken by a subclass."""

    def __init__(self, options):
        super().__init__(options)
        self._steps = queue.SimpleQueue()
        self._thread = None

    def start(self, spec, on_event):
        info = super().start(spec, on_event)
        self._thread = threading.Thread(target=self._serve, name="steps")
        self._thread.start()
        return msgspec.structs.replace(info, max_in_flight=2)

    def submit(self, plan):
        future = Future()
        if self._thread is None:
            future.set_exception(RuntimeError("not running"))
        else:
            self._steps.put((plan, future))
        return future

    def _serve(self):
        while (step := self._steps.get()) is not None:
            plan, future = step
            try:
                self.settle(future, self.execute(plan))
            except Exception as error:
                successors = [self._steps.get() for _ in range(self._steps.qsize())]
                self.fail(future, error)
                for later in successors:
                    if later is None:
                        return
                    later[1].set_exception(RuntimeError("the step before failed"))

    def execute(self, plan):
        return self._worker.execute(plan)

    def settle(self, future, result):
        future.set_result(result)

    def fail(self, future, error):
        future.set_exception(error)

    def shutdown(self):
        if self._thread is not None:
            self._steps.put(None)
            self._thread.join()
            self._thread = None
        super().shutdown()


class TestThreaded(ExecutorConformance):
    executor = Threaded


def test_the_traffic_is_worth_it(tmp_path):
    """Preemption, chunked prefill, prefix hits and mixed steps all happen, so that an executor could get them wrong."""
    suite = TestThreaded()
    suite.setup_class()
    with suite.driver(suite.spec(tmp_path)) as driver:
        add_traffic(driver, random.Random(0))
        driver.run()
    plans = [plan for plan, _ in driver.steps]
    assert any(plan.preempted for plan in plans)
    assert any(plan.finished for plan in plans)
    assert any(not all(plan.sample) for plan in plans)
    assert any(admission.num_cached_tokens for plan in plans for admission in plan.admitted)
    assert any(1 in plan.num_tokens and max(plan.num_tokens) > 1 for plan in plans)
    assert any(result.logprobs for _, result in driver.steps) and any(
        result.prompt_logprobs for _, result in driver.steps
    )


# ── order and results ─────────────────────────────────────────────────────────────────────────────────────────


class OutOfOrder(Threaded):
    """Every third step is announced late."""

    def settle(self, future, result):
        if result.step_id % 3:
            super().settle(future, result)
        else:
            threading.Timer(0.05, super().settle, (future, result)).start()


class Swapped(Threaded):
    def execute(self, plan):
        return msgspec.structs.replace(super().execute(plan), step_id=plan.step_id ^ 1)


class RowsReversed(Threaded):
    def execute(self, plan):
        result = super().execute(plan)
        return msgspec.structs.replace(result, token_ids=result.token_ids[::-1])


class IgnoresSeeds(UniprocessExecutor):
    def submit(self, plan):
        admitted = [msgspec.structs.replace(admission, seed=1) for admission in plan.admitted]
        return super().submit(msgspec.structs.replace(plan, admitted=admitted))


class ForgetsLogprobs(Threaded):
    def execute(self, plan):
        return msgspec.structs.replace(super().execute(plan), logprobs={})


class LosesBlocks(UniprocessExecutor):
    """Tables of requests are extended for the first two steps only."""

    def submit(self, plan):
        if plan.step_id > 1:
            plan = msgspec.structs.replace(plan, blocks=[type(delta)([], [], []) for delta in plan.blocks])
        return super().submit(plan)


class OneAtATime(Threaded):
    """Says that two steps may be under way, and then takes the second when the first is done."""

    def submit(self, plan):
        return super().submit(plan).result()


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        (OutOfOrder, "order: steps [0, 1, 2,"),
        (Swapped, "order: the result of step 0 says that it is of step 1"),
        (RowsReversed, "tokens: the result of step"),
        (IgnoresSeeds, "tokens: the result of step"),
        (ForgetsLogprobs, "logprobs: the result of step"),
        (LosesBlocks, "tokens: the result of step"),
        (OneAtATime, "not a concurrent.futures.Future"),
    ],
)
def test_wrong_results(complaint, executor, text):
    assert text in complaint(executor, "results_are_those_of_a_worker", timeout_s=5.0)


class MoreBlocks(UniprocessExecutor):
    def start(self, spec, on_event):
        info = super().start(spec, on_event)
        return msgspec.structs.replace(info, kv=msgspec.structs.replace(info.kv, num_blocks=10**4))


class NoReasons(UniprocessExecutor):
    def start(self, spec, on_event):
        return msgspec.structs.replace(super().start(spec, on_event), selections=())


class NeverHealthy(UniprocessExecutor):
    def check_health(self):
        raise RuntimeError("it has a cold")


@pytest.mark.parametrize(
    ("executor", "text"),
    [(MoreBlocks, "10000 blocks"), (NoReasons, "selections tell of [] only"), (NeverHealthy, "it has a cold")],
)
def test_wrong_information(complaint, executor, text):
    assert text in complaint(executor, "start_says_what_it_offers")


def test_refusing_the_empty_plan(complaint):
    class RefusesEmptyPlans(Threaded):
        def execute(self, plan):
            assert plan.slots, "nothing to do"
            return super().execute(plan)

    assert "nothing to do" in complaint(RefusesEmptyPlans, "empty_plans")


def test_accepting_any_operation(complaint):
    class AcceptsAnything(UniprocessExecutor):
        def control(self, operation, **arguments):
            return None

    assert "should be a ValueError that names it" in complaint(AcceptsAnything, "unknown_operation")


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────


class HangsOnFailure(Threaded):
    def fail(self, future, error):
        pass


class RaisesFromSubmit(UniprocessExecutor):
    def submit(self, plan):
        future = super().submit(plan)
        future.result()
        return future


class Speechless(Threaded):
    def fail(self, future, error):
        future.set_exception(RuntimeError())


class PretendsToBeHealthy(Threaded):
    """After a failure every step gives zeros."""

    failed = False

    def fail(self, future, error):
        self.failed = True
        super().fail(future, error)

    def execute(self, plan):
        result = super().execute(plan)
        return msgspec.structs.replace(result, token_ids=[0] * len(result.token_ids)) if self.failed else result


class SwallowsFailures(Threaded):
    def execute(self, plan):
        try:
            return super().execute(plan)
        except IndexError:
            return super().execute(msgspec.structs.replace(plan, slots=[], num_tokens=[], sample=[], admitted=[]))


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        (HangsOnFailure, "no hanging: a step is neither done nor failed"),
        (RaisesFromSubmit, "failure: submit raised IndexError"),
        (Speechless, "says nothing"),
        (PretendsToBeHealthy, "failure: after a failed step check_health raises nothing"),
        (SwallowsFailures, "result of step 0: 0 counts for 1 rows"),
    ],
)
def test_failures_that_are_not_reported(complaint, executor, text):
    assert text in complaint(executor, "a_failing_step_is_reported", timeout_s=2.0)


def test_an_executor_may_die_of_a_failure_if_it_says_so():
    class Dies(Threaded):
        error = None

        def fail(self, future, error):
            self.error = error
            super().fail(future, error)

        def check_health(self):
            if self.error:
                raise RuntimeError("dead") from self.error

    suite = type("Suite", (ExecutorConformance,), {"executor": Dies})
    assert failures(suite, only="test_a_failing_step") == {}


def test_a_row_that_takes_the_step_with_it(complaint):
    class AllOrNothing(Threaded):
        def execute(self, plan):
            result = super().execute(plan)
            assert not result.errors, f"rows failed: {result.errors}"
            return result

    assert "rows failed" in complaint(AllOrNothing, "a_row_fails_alone")


class AbandonsSteps(Threaded):
    """Steps that have not been run when it is shut down are never heard of again."""

    def shutdown(self):
        while not self._steps.empty():
            self._steps.get()
        super().shutdown()

    def execute(self, plan):
        threading.Event().wait(0.2)
        return super().execute(plan)


def test_steps_that_are_abandoned(complaint):
    assert "no hanging: a step is neither done" in complaint(AbandonsSteps, "shutdown", timeout_s=1.0)
