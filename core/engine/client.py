"""The engine client: how a front talks to an engine core, wherever it runs.

Two transports, one interface: `InlineClient` (a thread of this process) and `ProcessClient` (another process, at the
other end of a link). Of the latter, `SubprocessClient` has a child (msgspec over ZMQ ipc); where the executor has a
host (`interfaces/host.py`) the process is elsewhere. `interlace.assemble` chooses. `Replicas` is a client made of
several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import msgspec

from interlace.errors import EngineDeadError
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import EngineRequest, StepOutput

OnOutput = Callable[[StepOutput], None]
OnDeath = Callable[[EngineDeadError], None]
OnEvent = Callable[[ExecutorEvent], None]
OnRestart = Callable[[ExecutorInfo], None]
OnLoss = Callable[[EngineDeadError, list[str], int], None]


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine loop itself says, or, where there is none any more, who watches over it."""

    status: str
    """`ok`: it answers. `degraded`: it works, but see `reason` (a policy was replaced, a step takes long).
    `restarting`: it died, and a new one is being started. `dead`: it died, and nothing more is tried."""
    reason: str | None = None
    """Why it is not `ok`."""
    restarts: int = 0
    """How often a new engine has taken the place of one that died."""
    last_cause: str | None = None
    """What the engine last died of, also after it was restarted."""
    num_running: int = 0
    num_waiting: int = 0
    steps: int = 0
    replicas: tuple[EngineHealth, ...] = ()
    """Of each replica, where there are several (`engine.replicas`); what stands above is then about all of them."""


class EngineClient(ABC):
    """Sends requests to one engine core and receives a `StepOutput` per step. Thread-safe."""

    on_restart: OnRestart | None = None
    """Set before `start`: called when a new engine has taken the place of one that died, from a thread of the client,
    before the new one is given any request. Only a client that restarts its engine calls it."""

    on_loss: OnLoss | None = None
    """Set before `start`: called when a part of the engine died, with the error, the ids of the engine requests that
    died with it, and the replica's index; the rest goes on. Only a client with replicas calls it."""

    @property
    def infos(self) -> tuple[ExecutorInfo, ...]:
        """Of each replica that has started; empty where the engine is one."""
        return ()

    def describe(self) -> list[tuple[str, str]]:
        """(subject, text) lines that the report of the start has beside those about the engine."""
        return []

    @abstractmethod
    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        """Start the engine and wait until it is ready; raises the true cause when it cannot start.

        `on_event` hears of progress while loading (kind `progress`) and of later events of the executor.
        Afterwards `on_output` is called once per step, from a thread of the client, and must not block.
        `on_death` is called when the engine stopped by itself, after its last output: with `EngineRestartingError` if
        a new one is being started, else with another `EngineDeadError`, which is the last call."""

    @abstractmethod
    def add(self, requests: list[EngineRequest]) -> None:
        """Queue requests; they enter the engine before its next step. Raises `EngineDeadError` if it is gone."""

    @abstractmethod
    def abort(self, request_ids: list[str]) -> None:
        """End requests; unknown and finished ids are ignored. Each aborted one is reported with reason `abort`."""

    @abstractmethod
    def health(self, timeout: float = 5.0) -> EngineHealth:
        """Ask the engine loop. Raises `EngineSilentError` if it does not answer within `timeout` s, and
        `EngineDeadError` if it is dead (a client that restarts its engine has something to say about that, too)."""

    @abstractmethod
    def control(self, operation: str, **arguments: Any) -> Any:
        """Run a named operation in the engine, between steps (`reset_prefix_cache`, `check_integrity`, …). Where there
        are replicas it runs in all of them, and the answer is a list."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop the engine and free everything; unfinished requests are dropped. May be called twice."""
