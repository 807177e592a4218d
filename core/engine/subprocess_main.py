"""The child process of `SubprocessClient`: `python -m interlace.engine.subprocess_main SOCKET_DIR`.

The child ends with its parent: it holds the read end of a pipe whose write end only the parent has.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading

import zmq

from interlace.engine.serving import serve_engine
from interlace.interfaces.host import EngineConnection
from interlace.spec import ResolvedSpec


class SocketConnection(EngineConnection):
    """The child's end of the two sockets. After `close` nothing more is said."""

    def __init__(self, socket_dir: str) -> None:
        self._commands: zmq.Socket[bytes] = zmq.Context().socket(zmq.PULL)
        self._commands.set_hwm(0)
        self._commands.connect(f"ipc://{socket_dir}/commands")
        self._context = zmq.Context()  # of its own, so that it can end while the receiver sits in a read
        self._outputs = self._context.socket(zmq.PUSH)
        self._outputs.set_hwm(0)  # sending never blocks
        self._outputs.connect(f"ipc://{socket_dir}/outputs")
        self._lock = threading.Lock()

    def receive(self) -> bytes:
        return self._commands.recv()

    def send(self, message: bytes) -> None:
        with self._lock:
            if not self._outputs.closed:
                self._outputs.send(message)

    def close(self) -> None:
        with self._lock:
            self._outputs.close(linger=2000)
            self._context.term()


def main(socket_dir: str) -> int:
    """Serve one engine until told to stop, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's to handle,
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is a service manager's signal to the whole group
    faulthandler.enable()  # a crash in native code leaves the Python stacks on stderr
    threading.Thread(target=_die_with_parent, args=(socket_dir,), daemon=True).start()
    return serve_engine(SocketConnection(socket_dir), _log_to_stderr)


def _log_to_stderr(spec: ResolvedSpec, level: int) -> None:
    name = f"engine {spec.replica}" if spec.num_replicas > 1 else "engine"
    logging.basicConfig(level=level, format=f"%(levelname)s %(name)s ({name}): %(message)s")


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
