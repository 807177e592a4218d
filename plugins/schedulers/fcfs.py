"""First come, first served: the whole policy, and the measure of how small a scheduler can be."""

from __future__ import annotations

from interlace.interfaces.scheduler import Outcome, Scheduler, StepBuilder


class Fcfs(Scheduler):
    """Running requests first, then waiting ones by `order_key` (arrival); the last in that order gives way."""

    starvation_free = True

    def plan(self, step: StepBuilder) -> None:
        for request in step.continue_running():
            while step.schedule(request) is Outcome.BLOCKS:
                victim = max(reversed(step.running), key=self.order_key)  # among equals, the last one admitted
                step.preempt(victim)
                if victim is request:
                    break
        for request in step.waiting:
            if step.schedule(request) in (Outcome.BLOCKS, Outcome.BUDGET, Outcome.SEATS):
                break
