"""The suite for schedulers is itself tested: each policy below breaks one promise, and the suite says which."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
from pydantic import BaseModel, Field

from interlace.interfaces.scheduler import Scheduler
from interlace.plugins.schedulers.fcfs import Fcfs
from interlace.testing import SchedulerConformance
from interlace.testing.conformance import failures

# ── what belongs to the core ──────────────────────────────────────────────────────────────────────────────────


def misuse(action: Any) -> type[Scheduler]:
    """First come, first served, that does `action(policy, step)` first."""

    class Misuse(Fcfs):
        def plan(self, step):
            action(self, step)
            super().plan(step)

    return Misuse


def write(policy, step):
    for request in step.waiting:
        request.priority = 0


def write_a_note(policy, step):
    for request in step.waiting:
        request.seen = True


def read_private(policy, step):
    for request in step.waiting:
        assert request.token_ids


def read_private_by_getattr(policy, step):
    assert [getattr(request, "status", None) for request in step.waiting]


def write_labels(policy, step):
    for request in step.waiting:
        request.labels["seen"] = "yes"


def delete(policy, step):
    for request in step.waiting:
        del request.params


def read_the_builders_inside(policy, step):
    assert step._queues


def write_to_the_builder(policy, step):
    step.token_budget_left = 10**6


def keep(policy, step):
    policy.step = step


def keep_in_a_cycle(policy, step):
    loop = [step]
    loop.append(loop)


def loop_over_calls(policy, step):
    while step.waiting:
        pass


def schedule_a_stranger(policy, step):
    step.schedule("r1")


def schedule_half_a_token(policy, step):
    for request in step.waiting:
        step.schedule(request, 2.5)


def sort_the_view(policy, step):
    step.waiting.sort(key=policy.order_key)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (write, "read-only requests: the policy writes request.priority"),
        (write_a_note, "read-only requests: the policy writes request.seen"),
        (write_labels, "raises nothing: plan raised TypeError"),
        (delete, "read-only requests: the policy deletes request.params"),
        (read_private, "read-only requests: the policy reads request.token_ids"),
        (read_private_by_getattr, "read-only requests: the policy reads request.status"),
        (read_the_builders_inside, "the builder: the policy uses step._queues"),
        (write_to_the_builder, "the builder: the policy writes step.token_budget_left"),
        (keep, "keeps no builder: a builder is still referred to"),
        (loop_over_calls, "calls: the policy made too many calls"),
        (schedule_a_stranger, "the builder: step.schedule is given 'r1'"),
        (schedule_half_a_token, "the builder: step.schedule(max_tokens=2.5)"),
        (sort_the_view, "raises nothing: plan raised AttributeError"),
    ],
)
def test_misuse(complaint, action, text):
    assert text in complaint(misuse(action), "steps_in_flight")


def test_a_builder_in_garbage_is_not_kept():
    suite = type("Suite", (SchedulerConformance,), {"scheduler": misuse(keep_in_a_cycle)})
    assert failures(suite, only="test_steps_in_flight") == {}


class UsesTheOldBuilder(Fcfs):
    old = None

    def plan(self, step):
        super().plan(step)
        self.old = step

    def on_finish(self, request, now):
        assert self.old.waiting is not None


def test_a_builder_used_after_its_step(complaint):
    assert "keeps no builder: the policy uses a builder after" in complaint(UsesTheOldBuilder, "abort_at_any_point")


class NeverForgets(Fcfs):
    def on_arrival(self, request, now):
        self.__dict__.setdefault("requests", []).append(request)


def test_requests_kept_for_ever(complaint):
    assert "forgets finished requests: the policy still refers to 200 of 200" in complaint(NeverForgets, "forgets")


# ── the order of the queue ────────────────────────────────────────────────────────────────────────────────────


class Aging(Fcfs):
    """The usual mistake: waiting time in a key that is asked for once."""

    now = 0.0

    def plan(self, step):
        self.now = step.now
        super().plan(step)

    def order_key(self, request):
        return request.priority - (self.now - request.arrival_time)


class Progressive(Fcfs):
    def order_key(self, request):
        return request.max_tokens - request.num_output_tokens


class NotANumber(Fcfs):
    def order_key(self, request):
        return (float("nan"), request.arrival_time)


class NotANumberForSome(Fcfs):
    def order_key(self, request):
        return float("nan") if request.priority > 0 else request.arrival_time


class MixedTypes(Fcfs):
    def order_key(self, request):
        return request.labels.get("tenant") or request.priority


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Aging, "and is"),
        (Progressive, "and is"),
        (NotANumber, "does not equal itself"),
        (MixedTypes, "do not compare"),
        (NotANumberForSome, "are in no order"),
    ],
)
def test_order_keys_that_do_not_order(complaint, policy, text):
    found = complaint(policy, "history" if policy in (Aging, Progressive, NotANumber) else "steps_in_flight")
    assert "a fixed order_key: " in found and text in found


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────


class Dice(Fcfs):
    def plan(self, step):
        step.continue_running()
        for request in random.sample(step.waiting, len(step.waiting)):
            step.schedule(request)
        super().plan(step)


class SharedState(Fcfs):
    """What one engine did decides what the next one does."""

    turns = itertools.count()

    def plan(self, step):
        if next(self.turns) % 7:
            super().plan(step)
        else:
            for request in (*step.running, *reversed(step.waiting)):
                step.schedule(request, 1)
            super().plan(step)


@pytest.mark.parametrize("policy", [Dice, SharedState])
def test_policies_that_do_not_repeat_themselves(complaint, policy):
    assert "determinism: history" in complaint(policy, "equal_input", seeds=range(48))


class ForgetsAborts(Fcfs):
    """Keeps books that only whoever runs to the end clears."""

    def __init__(self, options):
        super().__init__(options)
        self.started = set()

    def plan(self, step):
        super().plan(step)
        self.started.update(request.id for request in step.running)

    def on_finish(self, request, now):
        self.started.remove(request.id)


def test_a_policy_that_raises_on_abort(complaint):
    assert "raises nothing: on_finish raised KeyError" in complaint(ForgetsAborts, "abort_at_any_point")


class Sleeps(Fcfs):
    def plan(self, step):
        while True:
            time.sleep(0.01)


class Spins(Fcfs):
    def plan(self, step):
        while True:
            pass


@pytest.mark.parametrize("policy", [Sleeps, Spins])
def test_policies_that_do_not_return(complaint, policy):
    assert "terminates: the test has not ended after 0.3 s" in complaint(policy, "budgets", time_limit_s=0.3)


class Generator(Fcfs):
    def plan(self, step):
        yield from step.continue_running()


class LooseOptions(Fcfs):
    class Options(BaseModel):
        length: int = 3


class BadDefault(Fcfs):
    class Options(BaseModel, extra="forbid"):
        length: int = Field(0, gt=0)


class NoOptions(Fcfs):
    def __init__(self, options):
        pass


class Required(Fcfs):
    class Options(BaseModel, extra="forbid"):
        length: int
        width: int = 1


@pytest.mark.parametrize(
    ("policy", "test", "text"),
    [
        (Generator, "declaration", "plan must not contain yield"),
        (NoOptions, "declaration", "call super().__init__(options)"),
        (LooseOptions, "options", "an unknown one is accepted"),
        (BadDefault, "options", "greater than 0"),
    ],
)
def test_wrong_classes(complaint, policy, test, text):
    assert text in complaint(policy, test)


def test_an_option_without_default_is_given_by_the_suite():
    suite = type("Suite", (SchedulerConformance,), {"scheduler": Required, "options": {"length": 2}})
    assert failures(suite, only="test_options") == {}


class Raises(Fcfs):
    def plan(self, step):
        raise RuntimeError("not today")


def test_a_failure_names_the_history_and_repeats(complaint):
    first, second = complaint(Raises, "history"), complaint(Raises, "history")
    assert first == second and "(history 0)" in first and "'seed': 0" in first
