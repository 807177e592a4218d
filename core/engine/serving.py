"""What an engine's process does, wherever it runs: one engine core, an executor, and a connection to the front.

The first message is the `ResolvedSpec` with the level of the log; nothing else of the configuration is read here.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable

import msgspec

from interlace.assemble import build_core, start_executor
from interlace.clock import MonotonicClock, ShiftedClock
from interlace.engine.loop import EngineLoop, Stop
from interlace.engine.startup import paused_gc
from interlace.engine.step_watchdog import StepWatchdog
from interlace.engine.wire import Died, Event, FromEngine, Logged, Output, Ready, Reply, decode_command, encode
from interlace.interfaces.executor import Executor, ExecutorEvent
from interlace.interfaces.host import EngineConnection
from interlace.remote_error import RemoteError
from interlace.spec import ResolvedSpec

HUNG_STATUS = 70
"""Exit status of a process whose watchdog found its loop stuck."""

Settle = Callable[[ResolvedSpec], ResolvedSpec]
SetUpLog = Callable[[ResolvedSpec, int], None]
"""(spec, level): called before anything is logged."""


def serve_engine(
    connection: EngineConnection, set_up_log: SetUpLog, settle: Settle = lambda spec: spec, *, hosted: bool = False
) -> int:
    """Serve one engine until told to stop, or until the front is gone; the exit status. See `interfaces.host`.

    `hosted`: whoever started the process may end it by `SystemExit`, and then says why at the other end of the link."""
    executor: Executor | None = None
    loop: EngineLoop | None = None

    def say(message: FromEngine) -> None:
        connection.send(encode(message))

    def hear(event: ExecutorEvent) -> None:
        say(Event(event))
        if loop is not None:
            loop.hear(event)

    code = 0
    try:
        spec, level = msgspec.msgpack.decode(connection.receive(), type=tuple[ResolvedSpec, int])
        set_up_log(spec, level)
        spec = settle(spec)
        with paused_gc():
            executor, info = start_executor(spec, hear)
        offset = connection.clock_offset
        clock = ShiftedClock(offset) if offset else MonotonicClock()
        loop = EngineLoop(
            build_core(spec, info, clock),
            executor,
            clock,
            lambda output: say(Output(output)),
            lambda call_id, value, error: say(Reply(call_id, value, RemoteError.of(error) if error else None)),
        )
        executor.check_health()  # what happened since it started, the loop has not heard
        gc.freeze()  # what the start has made stays; a full collection between two steps need not look through it
        say(Ready(info))
        threading.Thread(target=_receive, args=(connection, loop), daemon=True).start()
        with StepWatchdog(loop, clock, spec.step_timeout_s, lambda error, report: _give_up(connection, error, report)):
            loop.run()
    except BaseException as error:
        if not (hosted and isinstance(error, SystemExit)):
            say(Died(RemoteError.of(error)))
        code = 1
    finally:
        if executor is not None:
            executor.shutdown()
        connection.close()
    return code


def serve_remotely(connection: EngineConnection, settle: Settle) -> int:
    """`serve_engine` on another machine than the front: the log goes to the front."""

    def forward_log(spec: ResolvedSpec, level: int) -> None:
        logging.basicConfig(level=level, handlers=[_LogToFront(connection)], format="%(message)s", force=True)

    return serve_engine(connection, forward_log, settle, hosted=True)


def _give_up(connection: EngineConnection, error: TimeoutError, report: str) -> None:
    """The loop is stuck: end the process, which is the only way out. The front logs the report."""
    connection.send(encode(Died(RemoteError(type(error).__name__, str(error), report))))
    connection.close()
    os._exit(HUNG_STATUS)


def _receive(connection: EngineConnection, loop: EngineLoop) -> None:
    """Hand commands to the loop until it is to stop."""
    try:
        while True:
            command = decode_command(connection.receive())
            loop.post(command)
            if isinstance(command, Stop):
                return
    except EOFError:  # the front has gone
        loop.post(Stop())


class _LogToFront(logging.Handler):
    """The log of an engine is the log of its front."""

    def __init__(self, connection: EngineConnection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send(encode(Logged(record.name, record.levelno, self.format(record))))
