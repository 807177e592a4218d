"""Scheduling policies that do everything wrong. None of them may lose or corrupt a request.

Each is a sensible plan with one fault, driven by a seed. They are what `interlace.testing.histories` runs random
traffic through; a plugin author may find in them what the core forgives.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from interlace.interfaces.scheduler import Outcome, Progress, RequestView, Scheduler, StepBuilder


class Adversary(Scheduler):
    """First come, first served, in small pieces between which a subclass may do its worst."""

    rejects = False
    """Whether requests may end as rejected."""

    def __init__(self, seed: int) -> None:
        super().__init__(self.Options())
        self.random = random.Random(seed)

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            pass

    def pieces(self, step: StepBuilder) -> Iterator[None]:
        """A sensible plan that pauses after every call."""
        for request in step.continue_running():
            yield
            while step.schedule(request) is Outcome.BLOCKS:
                victim = step.running[-1]
                step.preempt(victim)
                yield
                if victim is request:
                    break
        for request in step.waiting:
            if step.schedule(request) in (Outcome.BLOCKS, Outcome.BUDGET, Outcome.SEATS):
                break
            yield

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def any_of(self, requests: Any) -> Any:
        """One of `requests`, or None."""
        return self.random.choice(list(requests)) if requests else None


class Raises(Adversary):
    """Raises at random points of a step, and in every optional method."""

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            if self.chance(0.2):
                raise RuntimeError("a scripted fault of the policy")

    def on_arrival(self, request: RequestView, now: float) -> None:
        raise RuntimeError("a scripted fault in on_arrival")

    def on_update(self, progress: Progress, now: float) -> None:
        raise RuntimeError("a scripted fault in on_update")

    def on_finish(self, request: RequestView, now: float) -> None:
        raise RuntimeError("a scripted fault in on_finish")


class AlwaysRaises(Adversary):
    """Raises at once, every time."""

    def plan(self, step: StepBuilder) -> None:
        raise RuntimeError("a scripted fault of the policy")


class SchedulesTwice(Adversary):
    """Schedules everything again, and again after preempting it."""

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            step.continue_running()
            for request in (*step.running, *step.waiting):
                step.schedule(request)
            if self.chance(0.1) and (victim := self.any_of(step.running)):
                step.preempt(victim)
                step.schedule(victim)


class PreemptsEverything(Adversary):
    """Schedules everything; in every second step, or in every step, takes it all back."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.every_step = self.chance(0.3)
        self.turn = 0

    def plan(self, step: StepBuilder) -> None:
        self.turn += 1
        if not self.every_step and self.turn % 2:
            super().plan(step)
            return
        if self.every_step:
            super().plan(step)
        for request in step.running:
            step.preempt(request)


class PreemptsAtRandom(Adversary):
    """Preempts anybody between any two calls."""

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            if self.chance(0.15) and (victim := self.any_of(step.running)):
                step.preempt(victim)


class Rejects(Adversary):
    """Rejects anybody at any time, twice."""

    rejects = True

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            if self.chance(0.05) and (request := self.any_of((*step.running, *step.waiting))):
                step.reject(request, "it was not its day")
                step.reject(request, "it was not its day")


class PlansNothing(Adversary):
    """Leaves all work undone, or asks to be woken later and leaves it then."""

    def plan(self, step: StepBuilder) -> None:
        if self.chance(0.3):
            step.wake_at(step.now + self.random.random() / 10)


class IgnoresOne(Adversary):
    """Never schedules some requests."""

    def plan(self, step: StepBuilder) -> None:
        for request in (*step.running, *step.waiting):
            if sum(request.id.encode()) % 3:
                step.schedule(request)


class CallsTooOften(Adversary):
    """Loops for ever, in one of several ways."""

    def plan(self, step: StepBuilder) -> None:
        way = self.random.randrange(5)
        while way == 0:
            for request in (*step.running, *step.waiting):
                step.schedule(request)
        while way == 1:
            step.continue_running()
        while way == 2 and step.token_budget_left >= 0:
            for request in step.waiting:
                step.schedule(request)
        while way == 3 and step.now >= 0:
            for request in step.running:
                step.preempt(request)
        while way == 4:
            for request in step.waiting:
                step.fits(request)
                step.cached_tokens(request)
            if not step.waiting:
                break


class KeepsTheBuilder(Adversary):
    """Goes on using the builder of the step before."""

    old: StepBuilder | None = None

    def plan(self, step: StepBuilder) -> None:
        self._misuse()
        self.old = step
        super().plan(step)

    def on_update(self, progress: Progress, now: float) -> None:
        self._misuse()

    def on_finish(self, request: RequestView, now: float) -> None:
        self._misuse()

    def on_arrival(self, request: RequestView, now: float) -> None:
        self._misuse()

    def _misuse(self) -> None:
        """Everything on the old builder; errors are what the core should answer with."""
        old = self.old
        if old is None:
            return
        calls: list[Callable[[], Any]] = [
            old.continue_running,
            lambda: [old.schedule(request) for request in old.waiting],
            lambda: [old.preempt(request) for request in old.running],
            lambda: old.reject(old.running[0], "too late"),
            lambda: old.wake_at(0.0),
        ]
        for call in self.random.sample(calls, 2):
            try:
                call()
            except Exception:
                continue


class SchedulesStrangers(Adversary):
    """Schedules, preempts and rejects requests that are over, and things that are no requests of this engine."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.strangers: list[Any] = [_Impostor("r1.0"), _Impostor("r2.0"), _Impostor("nobody")]

    def plan(self, step: StepBuilder) -> None:
        for _ in self.pieces(step):
            stranger = self.any_of(self.strangers)
            step.schedule(stranger)
            step.preempt(stranger)
            step.reject(stranger, "a stranger")
            step.fits(stranger)
            step.cached_tokens(stranger)
        if self.chance(0.05):
            step.schedule(None)  # type: ignore[arg-type]

    def on_finish(self, request: RequestView, now: float) -> None:
        self.strangers.append(request)


class _Impostor:
    """Has the id of a request and is none."""

    def __init__(self, id: str) -> None:
        self.id = id

    def __getattr__(self, name: str) -> int:
        return 1


class OddChunks(Adversary):
    """Gives every request a chunk of its own odd size."""

    def plan(self, step: StepBuilder) -> None:
        sizes = (None, 0, 1, 2, 3, 7, -1, 10**9, 2.5, math.inf, math.nan, "4")
        for request in (*step.running, *step.waiting):
            size: Any = self.random.choice(sizes)
            if step.schedule(request, size) is Outcome.BLOCKS and self.chance(0.5):
                step.preempt(request)


class OddKeys(Adversary):
    """Has an order key that raises, cannot be compared, or changes."""

    def order_key(self, request: RequestView) -> Any:
        way = self.random.randrange(6)
        if way == 0:
            raise RuntimeError("a scripted fault in order_key")
        return [None, math.nan, "late", self.random.random(), (1, None), (1, "a")][way]


class OddWakes(Adversary):
    """Asks to be woken at times that do not exist."""

    def plan(self, step: StepBuilder) -> None:
        super().plan(step)
        times = (math.nan, math.inf, -math.inf, "soon", None, -1.0, 0.0)
        time: Any = self.random.choice(times)
        step.wake_at(time)


class Anything(Adversary):
    """Random calls on random requests in random order."""

    rejects = True

    def plan(self, step: StepBuilder) -> None:
        for _ in range(self.random.randrange(12)):
            request = self.any_of((*step.running, *step.waiting))
            if request is None:
                break
            match self.random.randrange(12):
                case 0 | 1 | 2:
                    step.schedule(request)
                case 3 | 4:
                    step.schedule(request, self.random.randrange(1, 9))
                case 5 | 6:
                    step.continue_running(order=lambda view: -view.arrival_time)
                case 7:
                    step.preempt(request)
                case 8:
                    self._foresee(step, request)
                case 9:
                    step.cached_tokens(request)
                case 10 if self.chance(0.1):
                    step.reject(request, "on a whim")
                case _:
                    step.schedule(request)

    def _foresee(self, step: StepBuilder, request: RequestView) -> None:
        """`fits` must say beforehand what `schedule` will do."""
        foreseen = step.fits(request)
        outcome = step.schedule(request)
        if foreseen != bool(outcome):
            raise BrokenPromiseError(f"fits said {foreseen} for {request!r}, schedule did {outcome}")


class BrokenPromiseError(BaseException):
    """The builder did not do what its contract says. Not an `Exception`, so that no fallback forgives it."""


ADVERSARIES: Mapping[str, Callable[[int], Adversary]] = {
    adversary.__name__: adversary
    for adversary in (
        Adversary,
        Raises,
        AlwaysRaises,
        SchedulesTwice,
        PreemptsEverything,
        PreemptsAtRandom,
        Rejects,
        PlansNothing,
        IgnoresOne,
        CallsTooOften,
        KeepsTheBuilder,
        SchedulesStrangers,
        OddChunks,
        OddKeys,
        OddWakes,
        Anything,
    )
}
"""Name → policy made from a seed."""
