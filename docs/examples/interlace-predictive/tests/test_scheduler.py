"""The policy in an engine without a model, on a virtual clock."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from interlace.interfaces.scheduler import Outcome, Scheduler, StepBuilder
from interlace.messages import Admission
from interlace.spec import SchedulerLimits
from interlace.testing.executor import ScriptedExecutor
from interlace.testing.harness import EngineHarness

from interlace_predictive.scheduler import ShortestPredicted

END = 0


class Fcfs(Scheduler):
    """First come, first served, to compare with."""

    def plan(self, step: StepBuilder) -> None:
        for request in step.continue_running():
            while step.schedule(request) is Outcome.BLOCKS:
                victim = step.running[-1]
                step.preempt(victim)
                if victim is request:
                    break
        for request in step.waiting:
            if step.schedule(request) in (Outcome.BLOCKS, Outcome.BUDGET, Outcome.SEATS):
                break


class KnownLengths(ScriptedExecutor):
    """The first token of a prompt is the length of its answer, which no scheduler can see."""

    def next_token(self, tokens: Sequence[int], admission: Admission) -> int:
        generated = len(tokens) - admission.num_prompt_tokens
        return END if generated + 1 == tokens[0] else 1 + generated


class Simulation:
    """An engine with four seats. Every step takes 10 ms."""

    def __init__(self, scheduler: Scheduler, num_blocks: int = 1024) -> None:
        executor = KnownLengths(KnownLengths.Options(manual=True, num_blocks=num_blocks))
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=128)
        self.harness = EngineHarness(scheduler, limits=limits, executor=executor, prefix_caching=False)
        self.finished: dict[str, float] = {}

    def add(self, length: int, num_prompt: int = 8, **labels: str) -> str:
        prompt = [length, *range(1, num_prompt)]
        return self.harness.add(prompt, max_tokens=200, eos_token_ids=(END,), labels=labels)

    def step(self) -> None:
        """One step; the clock moves even if there was nothing to do."""
        if self.harness.step() is None:
            self.harness.clock.advance(0.01)
        for request_id, record in self.harness.records.items():
            if record.finish is not None:
                self.finished.setdefault(request_id, self.harness.clock.now())

    def finish(self) -> Mapping[str, float]:
        """Go on to the end; returns the time each request took."""
        while self.harness.core.has_work:
            self.step()
        self.harness.check_end()
        records = self.harness.records
        return {name: time - records[name].request.arrival_time for name, time in self.finished.items()}


def predictive(**options: Any) -> ShortestPredicted:
    return ShortestPredicted(ShortestPredicted.Options(**options))


def mean_completion(scheduler: Scheduler, seed: int) -> float:
    """Seconds a request takes on average: two kinds of work, arriving at random a little faster than they are done."""
    simulation, rng = Simulation(scheduler), random.Random(seed)
    for _ in range(150):
        if rng.random() < 0.7:
            simulation.add(rng.randint(1, 4), num_prompt=rng.randint(40, 60), task="classify")
        else:
            simulation.add(rng.randint(40, 80), num_prompt=rng.randint(8, 15), task="write")
        for _ in range(rng.randint(0, 9)):
            simulation.step()
    times = simulation.finish()
    return sum(times.values()) / len(times)


@pytest.mark.parametrize("seed", range(3))
def test_mean_completion_time_beats_fcfs(seed: int):
    fcfs, mine = mean_completion(Fcfs(Fcfs.Options()), seed), mean_completion(predictive(label="task"), seed)
    print(f"fcfs {fcfs:.2f} s, predictive {mine:.2f} s")
    assert mine < 0.85 * fcfs


def long_request_among_short_ones(aging: float, steps: int) -> float | None:
    """When a long request is through that competes with short ones without end, or None if it is not."""
    simulation = Simulation(predictive(aging=aging))
    for _ in range(40):  # learn both kinds
        simulation.add(4, num_prompt=40)
        simulation.add(80)
    simulation.finish()
    start = simulation.harness.clock.now()
    for _ in range(4):
        simulation.add(4, num_prompt=40)
    long = simulation.add(80)
    for _ in range(steps):
        while len(simulation.harness.core.queues.waiting) < 8:
            simulation.add(4, num_prompt=40)
        simulation.step()
        if long in simulation.finished:
            return simulation.finished[long] - start
    return None


def test_long_requests_do_not_starve():
    """The prediction sets the long one back by some 75 tokens of work, which waiting for 75 / 20 s makes up for."""
    seconds = long_request_among_short_ones(aging=20.0, steps=1000)
    assert seconds is not None and 2 < seconds < 7


def test_without_aging_it_would():
    assert long_request_among_short_ones(aging=1e-9, steps=600) is None


def test_the_most_work_left_gives_way():
    """Blocks run short while a nearly finished and a fresh long request run: the fresh one is preempted."""
    simulation = Simulation(predictive(prior=60.0), num_blocks=26)
    old = simulation.add(60)
    for _ in range(50):
        simulation.step()
    young = simulation.add(60, num_prompt=30)
    for _ in range(200):
        simulation.step()
        if simulation.harness.records[old].finish:
            break
        assert simulation.harness.state(old).num_preemptions == 0
    simulation.finish()
    preempted = [slot for plan in simulation.harness.plans for slot in plan.preempted]
    assert preempted and simulation.finished[old] < simulation.finished[young]
