"""`RayHost`: whole engines on the nodes of a Ray cluster. `RayLink`: the front's end of one of them.

As with ranks, only a child process of the front, the launcher, speaks to Ray; messages go over a connection of their
own. Each link has a launcher to itself, so that one that is lost takes one engine with it.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from interlace.clock import Clock, MonotonicClock
from interlace.errors import ConfigError, EngineDeadError, InterlaceError
from interlace.interfaces.host import EngineLink, Host
from interlace.plugins.executors.cluster.carrier import Outbox, tell_time
from interlace.plugins.executors.cluster.launch import LauncherProcess
from interlace.plugins.executors.cluster.messages import Gone, Launch, Placed, Refused, Seat, Why
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.cluster.tcp import connect, read_all
from interlace.plugins.executors.processes.channel import MessageReader

if TYPE_CHECKING:
    from interlace.spec import ResolvedSpec

logger = logging.getLogger("interlace.executors")

CONNECT_TIMEOUT = 10.0
EXPLANATION_TIMEOUT = 6.0
"""Seconds the launcher is given to find out why an engine is gone."""
LAST_WORDS_S = 1.0
"""Seconds for what an engine said last to arrive, once Ray says that it is gone."""
STACKS_TIMEOUT = 1.0


def ray_host(options: Mapping[str, Any]) -> RayHost | None:
    """Where engines run whose executor is `ray` with these options; None: beside their front."""
    given = RayOptions(**options)
    return RayHost(given) if given.engine_core == "cluster" else None


class RayHost(Host):
    """Ray chooses a node for each engine."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options

    def link(self, spec: ResolvedSpec) -> RayLink:
        if find_spec("ray") is None:
            raise ConfigError("executor.use is 'ray', but Ray is not installed: pip install 'interlace[ray]'")
        self._options.check(spec)
        return RayLink(spec, self._options, MonotonicClock())

    def describe(self) -> str:
        return f"on nodes of the Ray cluster {self._options.address}"


class RayLink(EngineLink):
    """Has Ray place an `EngineActor`, and connects to it."""

    def __init__(self, spec: ResolvedSpec, options: RayOptions, clock: Clock) -> None:
        self._spec = spec
        self._options = options
        self._clock = clock
        self._launcher: LauncherProcess | None = None
        self._seat: Seat | None = None
        self._socket: socket.socket | None = None
        self._reader: MessageReader | None = None
        self._outbox: Outbox | None = None
        self._reason = ""  # why it is gone
        self._gone = threading.Event()
        self._closed = False
        self._parted = False
        self._parting = threading.Lock()
        self._lock = threading.Lock()
        self._starting = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._seat.pid if self._seat else None

    @property
    def place(self) -> str:
        return f"node {self._seat.host}" if self._seat else ""

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        with self._starting:
            with self._lock:
                if self._closed:
                    raise EngineDeadError("the engine was shut down")
                self._launcher = launcher = LauncherProcess(own_cluster=False)
            level = logging.getLogger("interlace").getEffectiveLevel()
            options = self._options.model_dump()
            launcher.send(Launch(spec=self._spec, options=options, folder="", log_level=level, whole_engine=True))
            seat = self._placed(launcher)
            self._connect(seat)
            self._seat = seat

    def _placed(self, launcher: LauncherProcess) -> Seat:
        while True:
            for said in launcher.read():
                match said:
                    case Placed(seats=(seat,)):
                        return seat
                    case Refused(error=error):
                        raise error.rebuild()
                    case Gone(text=text):
                        raise InterlaceError(f"the engine was lost while it was placed: {text}")

    def _connect(self, seat: Seat) -> None:
        where = f"the engine (pid {seat.pid} on node {seat.host})"
        try:
            self._socket = connection = connect(seat, CONNECT_TIMEOUT)
        except OSError as error:
            raise InterlaceError(
                f"{where} cannot be reached at port {seat.port} ({error}): the machines of a cluster must reach each "
                "other on all ports"
            ) from error
        connection.settimeout(self._options.start_timeout_s)
        try:
            tell_time(connection, self._clock)
        except (OSError, EOFError) as error:
            raise InterlaceError(
                f"{where} was lost before it was ready: {error or 'it closed the connection'}"
            ) from error
        connection.settimeout(None)
        self._reader, self._outbox = MessageReader(connection), Outbox(connection)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, message: bytes) -> None:
        if self._gone.is_set() or self._outbox is None:
            raise ConnectionError("the engine is gone")
        self._outbox.put(message)

    def receive(self, timeout_s: float | None) -> list[bytes]:
        assert self._socket is not None and self._reader is not None and self._launcher is not None
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        if not self._reason:
            poller.register(self._launcher, select.POLLIN)
        while not self._gone.is_set():
            patience = LAST_WORDS_S if self._reason else timeout_s
            ready = {descriptor for descriptor, _ in poller.poll(None if patience is None else 1000 * patience)}
            if self._socket.fileno() in ready:
                try:
                    messages = self._reader.read()
                except (EOFError, OSError):
                    self._gone.set()
                    break
                if messages:
                    return messages
            elif ready:
                self._hear_launcher()
                poller.unregister(self._launcher)
            elif self._reason:
                self._gone.set()
            else:
                return []
        raise EOFError

    def _hear_launcher(self) -> None:
        """It speaks when Ray says that the engine is gone. If the launcher itself is gone, Ray ends the engine."""
        assert self._launcher is not None
        try:
            self._reason = next((said.text for said in self._launcher.read() if isinstance(said, Gone)), "")
        except InterlaceError as error:
            self._reason = str(error)
        self._reason = self._reason or "nobody knows why"

    def obituary(self) -> str:
        assert self._launcher is not None
        if not self._reason:
            self._launcher.send(Why(0))
            poller = select.poll()
            poller.register(self._launcher, select.POLLIN)
            if poller.poll(1000 * EXPLANATION_TIMEOUT):
                self._hear_launcher()
        return f"is gone: {self._reason or 'it has closed its connection'}"

    # ── end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def interrupt(self) -> None:
        assert self._seat is not None
        stacks = read_all(self._seat, STACKS_TIMEOUT) or "it did not answer: it is stopped, or in native code"
        logger.error("the engine (pid %d on %s) is frozen:\n%s", self._seat.pid, self.place, stacks)

    def kill(self) -> None:
        """The launcher has Ray end the actor, with whatever it has started."""
        self._gone.set()
        with self._parting:
            if self._parted:
                return
            self._parted = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            if self._launcher is not None:
                self._launcher.stop()

    def wait(self, timeout_s: float) -> bool:
        return self._gone.wait(timeout_s)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.kill()
        with self._starting:  # a `start` under way finds everything gone
            if self._outbox is not None:
                self._outbox.close()
            if self._socket is not None:
                self._socket.close()
            if self._launcher is not None:
                self._launcher.release()
