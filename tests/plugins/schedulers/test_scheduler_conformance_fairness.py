"""The suite notices policies that get nowhere, and unfair ones that claim to be fair."""

from __future__ import annotations

import pytest

from interlace.interfaces.scheduler import Outcome, Scheduler
from interlace.plugins.schedulers.fcfs import Fcfs


class PlansNothing(Scheduler):
    def plan(self, step):
        pass


class IgnoresSome(Scheduler):
    def plan(self, step):
        for request in (*step.running, *step.waiting):
            if request.num_prompt_tokens != 13:
                while step.schedule(request) is Outcome.BLOCKS and request in step.running:
                    step.preempt(step.running[-1])


class NeverPreempts(Scheduler):
    def plan(self, step):
        step.continue_running()
        for request in step.waiting:
            step.schedule(request)


class WakesAtOnce(Scheduler):
    def plan(self, step):
        step.wake_at(step.now)


class WakesForEver(Scheduler):
    def plan(self, step):
        step.wake_at(step.now + 1)


@pytest.mark.parametrize(
    ("policy", "test", "text"),
    [
        (PlansNothing, "history", "progress: plan left the step empty"),
        (IgnoresSome, "budgets", "progress: plan left the step empty"),
        (NeverPreempts, "preemption_pressure", "progress: plan left the step empty"),
        (WakesAtOnce, "steps_in_flight", "progress: plan left the step empty and asked to be woken"),
        (WakesForEver, "steps_in_flight", "terminates: 7 requests never end"),
    ],
)
def test_no_progress(complaint, policy, test, text):
    assert text in complaint(policy, test)


class Unfair(Fcfs):
    """Claims to be fair; subclasses say in which order it serves instead."""

    starvation_free = True

    def plan(self, step):
        for request in sorted((*step.running, *step.waiting), key=self.order_key):
            while step.schedule(request) is Outcome.BLOCKS and request in step.running:
                victim = max(step.running, key=self.order_key)
                step.preempt(victim)
                if victim is request:
                    break


class LastComeFirstServed(Unfair):
    def order_key(self, request):
        return -request.arrival_time


class Urgent(Unfair):
    def order_key(self, request):
        return (request.priority, request.arrival_time)


class Shortest(Unfair):
    def order_key(self, request):
        return (request.num_prompt_tokens, request.arrival_time)


class Longest(Unfair):
    def order_key(self, request):
        return (-request.num_prompt_tokens, request.arrival_time)


class FewestTokens(Unfair):
    def order_key(self, request):
        return (request.max_tokens, request.arrival_time)


class Tenants(Unfair):
    def order_key(self, request):
        return (request.labels.get("tenant", "") != "loud", request.arrival_time)


class NewcomersFirst(Unfair):
    """Fair to who waits, but their prompts may take the whole step from who runs."""

    def plan(self, step):
        for request in (*step.waiting, *step.running):
            while step.schedule(request) is Outcome.BLOCKS and request in step.running:
                step.preempt(step.running[-1])


class CachedFirst(Unfair):
    def plan(self, step):
        for request in step.continue_running():
            while step.schedule(request) is Outcome.BLOCKS:
                victim = step.running[-1]
                step.preempt(victim)
                if victim is request:
                    break
        for request in sorted(step.waiting, key=step.cached_tokens, reverse=True):
            step.schedule(request)


@pytest.mark.parametrize(
    "policy", [LastComeFirstServed, Urgent, Shortest, Longest, FewestTokens, Tenants, NewcomersFirst, CachedFirst]
)
def test_unfair_policies_that_claim_to_be_fair(complaint, policy):
    assert "starvation_free: a request is not done 200 steps" in complaint(
        policy, "no_starvation", starvation_steps=200
    )
