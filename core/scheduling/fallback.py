"""What happens when a policy fails: the core completes the step itself, in arrival order, without preempting."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from interlace.interfaces.scheduler import Outcome, Progress, RequestView, Scheduler
from interlace.scheduling.step_builder import StepBuilder

logger = logging.getLogger("interlace.scheduling")

MAX_FAILURES = 10
"""After this many failed steps in a row, the fallback stays in charge."""
MAX_PREEMPTIONS = 4
"""Preemptions per unfinished request (and for 16 requests more) without any request gaining a token, after which the
fallback stays in charge: a policy that takes back whatever it starts would never finish anything."""
_OPTIONAL = ("order_key", "on_arrival", "on_update", "on_finish")


class GuardedPolicy:
    """Runs a policy so that its mistakes cost speed or fairness, never a request.

    A policy fails a step by raising, by making too many calls, or by planning nothing although something could run
    and it did not ask to be woken. Its valid partial plan is kept and completed by the fallback. It is replaced for
    good when it fails too often in a row, or preempts without end.

    The time spent in the policy is added up, `timer` being read twice a call. Only what a policy overrides is called,
    so a step costs two readings, or four with `on_update`; `order_key`, `on_arrival` and `on_finish` cost two or four
    more in the life of a request.
    """

    def __init__(self, policy: Scheduler, name: str, timer: Callable[[], float]) -> None:
        self.policy = policy
        self.name = name
        self.account = f"schedulers:{name}"
        self.failures = 0  # in a row
        self.fruitless = 0  # preemptions since any request gained a token
        self.degraded: str | None = None
        self._timer = timer
        self._seconds = 0.0
        self._own = {name for name in _OPTIONAL if getattr(type(policy), name) is not getattr(Scheduler, name)}
        self._complained: set[str] = set()

    @property
    def replaced(self) -> bool:
        """Whether the fallback is in charge for good."""
        return self.failures >= MAX_FAILURES

    def take_seconds(self) -> float:
        """Seconds spent in the policy since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    # ── calls of the policy ───────────────────────────────────────────────────────────────────────────────────

    @property
    def order_key(self) -> Callable[[RequestView], Any]:
        """The policy's sort key of waiting requests."""
        return self._timed_order_key if "order_key" in self._own else self.policy.order_key

    def _timed_order_key(self, request: RequestView) -> Any:
        began = self._timer()
        try:
            return self.policy.order_key(request)
        finally:
            self._seconds += self._timer() - began

    def on_arrival(self, request: RequestView, now: float) -> None:
        """Tell the policy that a request was added."""
        if "on_arrival" in self._own:
            self._tell("on_arrival", (request,), now)

    @property
    def wants_updates(self) -> bool:
        """Whether a `Progress` need be made for the policy."""
        return "on_update" in self._own and not self.replaced

    def on_update(self, progress: Progress, now: float) -> None:
        """Tell the policy what a step changed."""
        self._tell("on_update", (progress,), now)

    def on_finish(self, requests: Sequence[RequestView], now: float) -> None:
        """Tell the policy which requests ended; of each, this is the last it hears."""
        if requests and "on_finish" in self._own:
            self._tell("on_finish", requests, now)

    def _tell(self, method: str, subjects: Sequence[Any], now: float) -> None:
        """Its failure in an optional method is logged once per method and hurts nobody."""
        function = getattr(self.policy, method)
        began = self._timer()
        for subject in subjects:
            try:
                function(subject, now)
            except (Exception, SystemExit):
                if method not in self._complained:
                    self._complained.add(method)
                    logger.exception(
                        "scheduler '%s' failed in %s; further failures in it are not reported", self.name, method
                    )
        self._seconds += self._timer() - began

    def plan(self, step: StepBuilder, anything_in_flight: bool, num_requests: int) -> None:
        """Let the policy compose `step`, and complete it where the policy failed."""
        if self.replaced:
            complete(step)
            return
        self._compose(step, anything_in_flight)
        self.fruitless += len(step.preempted)
        if self.fruitless > MAX_PREEMPTIONS * (num_requests + 16):
            self._replace(f"it preempted {self.fruitless} times and no request gained a token")

    def _compose(self, step: StepBuilder, anything_in_flight: bool) -> None:
        began = self._timer()
        try:
            self.policy.plan(step)
        except (Exception, SystemExit) as error:
            self._seconds += self._timer() - began
            self._failed(step, f"{type(error).__name__}: {error}", error)
            return
        self._seconds += self._timer() - began
        if not step.rows and not anything_in_flight and step.wake_time is None:
            complete(step)
            if step.rows or step.preempted:
                self._failed(step, "it planned nothing although something could run")
            return
        self.failures = 0

    def _failed(self, step: StepBuilder, reason: str, error: BaseException | None = None) -> None:
        self.failures += 1
        complete(step)
        if self.failures in (1, MAX_FAILURES):
            logger.error("scheduler '%s' failed a step: %s", self.name, reason, exc_info=error)
        if self.replaced:
            self._replace(f"it failed {self.failures} steps in a row: {reason}")

    def _replace(self, reason: str) -> None:
        self.failures = MAX_FAILURES
        self.degraded = (
            f"scheduler '{self.name}' was replaced by the fallback (arrival order, no preemption) until a restart: "
            f"{reason}"
        )
        logger.error("%s", self.degraded)


def complete(step: StepBuilder) -> None:
    """Fill the rest of a step: running requests first, then waiting ones in arrival order; no preemption, unless
    running requests hold all blocks and none of them can go on."""
    step.restore_calls()
    short = step.continue_running()
    if short and not step.rows and not step.preempted:
        # Nothing else would ever free a block: the youngest gives way.
        step.preempt(max(reversed(short), key=lambda request: request.arrival_time))
        for request in short:
            step.schedule(request)
    for request in sorted(step.waiting, key=lambda request: request.arrival_time):
        if step.schedule(request) in (Outcome.BLOCKS, Outcome.BUDGET, Outcome.SEATS):
            break
