"""The contract of engine hosts (version 1): how an engine runs somewhere else than beside its front.

An executor whose engine core can go where its workers are says so with `Provider.host`. The core keeps what travels;
a host brings it there: it starts a process somewhere, in which `serve_engine` is called, and carries messages.

In the front, for each start of an engine: `Host.link`, `EngineLink.start`, then `send` and `receive` until `receive`
raises `EOFError`, then `EngineLink.close`. In the engine's process: `serve_engine` with an `EngineConnection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interlace.spec import ResolvedSpec


class EngineLink(ABC):
    """The front's end of one engine, from its start to its end. Used once.

    `start`, `receive` and `obituary` are called by one thread at a time, everything else by any."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Process id of the engine where it runs; None before the start."""

    @property
    def place(self) -> str:
        """Where it runs, for messages (`node 10.0.0.2`); empty: on this machine."""
        return ""

    @abstractmethod
    def start(self) -> None:
        """Start the engine's process and wait until it takes messages; raises the true cause if that fails, and
        anything once `close` is called meanwhile. A process that ends right away may also be left to `receive`."""

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Hand over a message; they arrive in order. Never waits for the engine. Raises `ConnectionError` if it is
        known to be gone, or the link is closed."""

    @abstractmethod
    def receive(self, timeout_s: float | None) -> list[bytes]:
        """Wait for messages, at most `timeout_s` (None: for ever); empty if none came. Raises `EOFError` once the
        engine is gone and all it had said is returned. That is noticed at once, or within seconds where a machine is
        lost."""

    @abstractmethod
    def obituary(self) -> str:
        """What is known of how an engine ended that gave no reason, as the end of a sentence: `was killed by signal 9`.
        Asked after `EOFError`; may take some seconds to find out."""

    def interrupt(self) -> None:
        """The engine answers nothing: have it put into the log what its threads are doing, if that can be done. It is
        killed soon after."""

    @abstractmethod
    def kill(self) -> None:
        """End the engine at once, whatever it does. Harmless if it has ended."""

    @abstractmethod
    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, within `timeout_s`."""

    @abstractmethod
    def close(self) -> None:
        """End what is still there, and free everything. May be called twice, and at any time."""


class Host(ABC):
    """Where engines run. One per front; `link` is called for each start, by one thread per replica."""

    @abstractmethod
    def link(self, spec: ResolvedSpec) -> EngineLink:
        """A link, not started, to an engine for `spec`. `spec.replica` and `spec.num_replicas` say which one it is;
        nothing of `threads`, `cache` and `device` was divided among them. Raises `ConfigError` for options that
        cannot be; does not block."""

    @abstractmethod
    def describe(self) -> str:
        """Where the engines run, for the report of the start: `on nodes of …`."""


class EngineConnection(ABC):
    """The engine's end of a link."""

    clock_offset: float = 0.0
    """Seconds to add to this machine's monotonic clock for the front's, which all times in messages are in. 0 on the
    front's own machine."""

    @abstractmethod
    def receive(self) -> bytes:
        """The next message; blocks. Raises `EOFError` when the front has gone. Called from one thread at a time."""

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Hand over a message; they arrive in order. Never waits for the front, and never raises: if that is gone,
        nobody hears it. Called from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Wait, not for ever, until everything is sent: the last word may be the reason of the end."""


def serve_engine(connection: EngineConnection, settle: Callable[[ResolvedSpec], ResolvedSpec]) -> int:
    """Run one engine until its front tells it to stop or has gone; the exit status of the process.

    To be called in the main thread of a process that exists for nothing else: logging is taken over (lines go to the
    front), and a step that hangs ends the process. `settle` is given the spec as the front has it, and returns what is
    to run here: an executor with no host of its own, and the device, threads and memory that are this engine's. What
    goes wrong, in `settle` too, is told to the front; not so `SystemExit`, by which a host may end the process: there
    `EngineLink.obituary` says why."""
    from interlace.engine.serving import serve_remotely

    return serve_remotely(connection, settle)
