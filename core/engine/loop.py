"""`EngineLoop`: the driver of an engine core. It owns waiting: for commands, for results, for a time to come."""

from __future__ import annotations

import logging
import os
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from interlace.clock import Clock
from interlace.engine.client import EngineHealth, OnOutput
from interlace.engine.core import EngineCore
from interlace.engine.snapshot import describe_state, take_snapshot
from interlace.errors import InterlaceError, InvalidRequestError
from interlace.interfaces.executor import WORKER_DIED, Executor, ExecutorEvent
from interlace.messages import EngineRequest, StepOutput, StepResult

logger = logging.getLogger("interlace.engine")

MAX_EMPTY_PLANS = 16
"""Plans without rows in a row after which the loop pauses instead of asking the policy again at once."""
PAUSE = 0.01
MAX_WAIT = 3600.0
"""Seconds after which the loop looks around even if nothing happens; longer waits are made of several."""


class Add(msgspec.Struct, frozen=True, tag=True):
    """Command: new requests."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Command: end these requests."""

    request_ids: list[str]


class Control(msgspec.Struct, frozen=True, tag=True):
    """Command: a named operation between steps; answered under `call_id`."""

    call_id: int
    operation: str
    arguments: dict[str, Any] = {}


class CheckExecutor(msgspec.Struct, frozen=True, tag=True):
    """Command: the executor says that something happened to it (`worker_died`); if it cannot go on, die of it now, and
    not when the next request comes."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Command: leave the loop."""


Command = Add | Abort | Control | CheckExecutor | Stop
OnReply = Callable[[int, Any, BaseException | None], None]
"""(call id, value, error) of a `Control`."""


class EngineLoop:
    """Runs one engine until it is told to stop. `post` may be called from any thread, `run` from one.

    While nothing can run it blocks on the inbox: an idle engine costs no CPU.
    """

    def __init__(
        self, core: EngineCore, executor: Executor, clock: Clock, on_output: OnOutput, on_reply: OnReply
    ) -> None:
        self._core = core
        self._executor = executor
        self._clock = clock
        self._on_output = on_output
        self._on_reply = on_reply
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._futures: deque[Future[StepResult]] = deque()
        self._steps = 0
        self._empty_plans = 0
        self._last_failure = ""  # a failure that repeats is logged without its traceback
        self.beat = 0
        """Changes whenever the loop comes round; what `StepWatchdog` looks at, with `waiting`."""
        self.waiting = False
        """Whether the loop waits for commands: then it is idle, and not stuck."""

    def post(self, command: Command) -> None:
        """Hand a command to the loop; it is carried out before the next plan."""
        self._inbox.put(command)

    def hear(self, event: ExecutorEvent) -> None:
        """An event of the executor, from any thread."""
        if event.kind == WORKER_DIED:
            self.post(CheckExecutor())

    def abandon(self, error: BaseException) -> None:
        """The loop is stuck and counts as dead: should it ever go on, it ends with `error` and nobody hears of it."""

        def end(output: StepOutput) -> None:
            raise error

        self._on_output = end
        self.post(Stop())

    def hang_report(self) -> str:
        """What the loop was doing, for the log; called from another thread while it is stuck."""
        return describe_state(self._core, self._clock.now(), self._steps)

    def run(self) -> None:
        """Serve until `Stop`. An exception means that the engine is dead."""
        while self._take_commands():
            self._submit()
            if self._futures:
                self._complete_step()
            output = self._core.pending_output(self._clock.now())
            if output is not None:
                self._on_output(output)

    # ── commands ──────────────────────────────────────────────────────────────────────────────────────────────

    def _take_commands(self) -> bool:
        """Carry out everything in the inbox; wait for the first entry when there is nothing else to do. False: stop."""
        timeout = self._idle_time()
        self.beat += 1
        try:
            command = self._inbox.get_nowait() if timeout == 0.0 else self._wait(timeout)
            while not isinstance(command, Stop):
                self._handle(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _wait(self, timeout: float | None) -> Command:
        self.waiting = True
        try:
            return self._inbox.get(timeout=timeout)
        finally:
            self.waiting = False

    def _idle_time(self) -> float | None:
        """How long the inbox may be waited on: 0 while there is work, None for as long as it takes."""
        core = self._core
        if self._futures or (core.has_runnable and self._empty_plans == 0):
            return 0.0
        pause = 0.0 if self._empty_plans < MAX_EMPTY_PLANS else PAUSE
        wakeup = core.next_wakeup()
        if wakeup is not None:
            return min(max(pause, wakeup - self._clock.now()), MAX_WAIT)
        return pause if core.has_runnable else None

    def _handle(self, command: Add | Abort | Control | CheckExecutor) -> None:
        now = self._clock.now()
        self._empty_plans = 0
        match command:
            case Add(requests=requests):
                for request in requests:
                    try:
                        self._core.add(request, now)
                    except InvalidRequestError as error:
                        logger.error("request refused: %s", error)
            case Abort(request_ids=request_ids):
                self._core.abort(request_ids, now)
            case Control():
                self._control(command)
            case CheckExecutor():
                self._check_executor(None)

    def _control(self, command: Control) -> None:
        try:
            value = self._perform(command.operation, command.arguments)
        except Exception as error:
            self._on_reply(command.call_id, None, error)
        else:
            self._on_reply(command.call_id, value, None)

    def _perform(self, operation: str, arguments: dict[str, Any]) -> Any:
        core = self._core
        match operation:
            case "health":
                self._executor.check_health()
                return EngineHealth(
                    status="degraded" if core.degraded else "ok",
                    reason=core.degraded,
                    num_running=len(core.queues.running),
                    num_waiting=len(core.queues.waiting) + len(core.queues.blocked),
                    steps=self._steps,
                )
            case "snapshot":
                return take_snapshot(core, self._clock.now(), self._steps, **arguments)
            case "process_id":
                return os.getpid()
            case "reset_prefix_cache":
                return core.reset_prefix_cache()
            case "check_integrity":
                return core.check_integrity()
            case "free_blocks":
                return core.kv.pool.num_free
            case "unblock":
                return core.unblock(**arguments)
            case _:
                return self._executor.control(operation, **arguments)

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self) -> None:
        """Keep up to `max_in_flight` steps under way."""
        while len(self._futures) < self._core.max_in_flight:
            plan = self._core.plan(self._clock.now())
            if plan is None:
                self._empty_plans += not self._futures
                return
            self._empty_plans = 0
            self._futures.append(self._executor.submit(plan))

    def _complete_step(self) -> None:
        """Wait for the oldest step and hand its news to the front."""
        future = self._futures.popleft()
        try:
            result = future.result()
        except Exception as error:
            repeated, self._last_failure = repr(error) == self._last_failure, repr(error)
            logger.error("a step failed; its requests end with an error: %s", error, exc_info=not repeated)
            self._check_executor(error)  # its death is told to all requests alike, with the error as the cause
            self._futures.clear()  # successors of a failed step fail, too
            self._on_output(self._core.fail(f"the step failed: {type(error).__name__}: {error}", self._clock.now()))
            return
        self._steps += 1
        self._on_output(self._core.update(result, self._clock.now()))

    def _check_executor(self, error: Exception | None) -> None:
        """Go on if the executor can, else die: with the error of the step that failed, if one did, as the cause."""
        try:
            self._executor.check_health()
        except Exception as unhealthy:
            raise InterlaceError(f"the executor cannot go on: {unhealthy}") from (error or unhealthy)
