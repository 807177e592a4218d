"""The child process of `SubprocessClient`: `python -m interlace.engine.subprocess_main SOCKET_DIR`.

The first message on the command socket is the `ResolvedSpec`; nothing else of the configuration is read here. The
child ends with its parent: it holds the read end of a pipe whose write end only the parent has.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import shutil
import signal
import sys
import threading

import msgspec
import zmq

from interlace.assemble import build_core, start_executor
from interlace.clock import MonotonicClock
from interlace.engine.loop import EngineLoop, Stop
from interlace.engine.startup import paused_gc
from interlace.engine.step_watchdog import StepWatchdog
from interlace.engine.wire import Died, Event, FromEngine, Output, Ready, Reply, decode_command, encode
from interlace.interfaces.executor import Executor, ExecutorEvent
from interlace.remote_error import RemoteError
from interlace.spec import ResolvedSpec

HUNG_STATUS = 70
"""Exit status of a child whose watchdog found its loop stuck."""


class Speaker:
    """The child's end of the output socket. Thread-safe; after `close` nothing more is said."""

    def __init__(self, socket_dir: str) -> None:
        self._context = zmq.Context()  # of its own, so that it can end while the receiver sits in a read
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.set_hwm(0)  # sending never blocks
        self._socket.connect(f"ipc://{socket_dir}/outputs")
        self._lock = threading.Lock()

    def send(self, message: FromEngine) -> None:
        with self._lock:
            if not self._socket.closed:
                self._socket.send(encode(message))

    def close(self) -> None:
        """Wait, not for ever, until everything is sent: the last word may be the reason of the end."""
        with self._lock:
            self._socket.close(linger=2000)
            self._context.term()


def main(socket_dir: str) -> int:
    """Serve one engine until told to stop, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle,
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is a service manager's signal to the whole group
    faulthandler.enable()  # a crash in native code leaves the Python stacks on stderr
    threading.Thread(target=_die_with_parent, args=(socket_dir,), daemon=True).start()
    commands: zmq.Socket[bytes] = zmq.Context().socket(zmq.PULL)
    commands.set_hwm(0)
    commands.connect(f"ipc://{socket_dir}/commands")
    speaker = Speaker(socket_dir)
    executor: Executor | None = None
    loop: EngineLoop | None = None

    def hear(event: ExecutorEvent) -> None:
        speaker.send(Event(event))
        if loop is not None:
            loop.hear(event)

    code = 0
    try:
        setup = msgspec.msgpack.decode(commands.recv(), type=tuple[ResolvedSpec, int])
        spec = setup[0]
        name = f"engine {spec.replica}" if spec.num_replicas > 1 else "engine"
        logging.basicConfig(level=setup[1], format=f"%(levelname)s %(name)s ({name}): %(message)s")
        with paused_gc():
            executor, info = start_executor(spec, hear)
        clock = MonotonicClock()
        loop = EngineLoop(
            build_core(spec, info, clock),
            executor,
            clock,
            lambda output: speaker.send(Output(output)),
            lambda call_id, value, error: speaker.send(Reply(call_id, value, RemoteError.of(error) if error else None)),
        )
        executor.check_health()  # what happened since it started, the loop has not heard
        gc.freeze()  # what the start has made stays; a full collection between two steps need not look through it
        speaker.send(Ready(info))
        threading.Thread(target=_receive, args=(commands, loop), daemon=True).start()
        with StepWatchdog(loop, clock, spec.step_timeout_s, lambda error, report: _give_up(speaker, error, report)):
            loop.run()
    except BaseException as error:
        speaker.send(Died(RemoteError.of(error)))
        code = 1
    finally:
        if executor is not None:
            executor.shutdown()
        speaker.close()
    return code


def _give_up(speaker: Speaker, error: TimeoutError, report: str) -> None:
    """The loop is stuck: end the process, which is the only way out. The parent logs the report."""
    speaker.send(Died(RemoteError(type(error).__name__, str(error), report)))
    speaker.close()
    os._exit(HUNG_STATUS)


def _receive(commands: zmq.Socket[bytes], loop: EngineLoop) -> None:
    while True:
        command = decode_command(commands.recv())
        loop.post(command)
        if isinstance(command, Stop):
            return


def _die_with_parent(socket_dir: str) -> None:
    """Block until the parent's end of stdin closes, which happens even when it is killed; then nobody else is left to
    clear the sockets away."""
    while os.read(0, 1024):
        pass
    shutil.rmtree(socket_dir, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the receiver thread may sit in a blocking read
