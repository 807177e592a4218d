"""`LocalLink`: an engine in a child process. Messages go over two ZMQ ipc sockets in a directory only this user can
enter. All waits block."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import zmq

from interlace.errors import EngineDeadError
from interlace.interfaces.host import EngineLink


class LocalLink(EngineLink):
    """Starts `interlace.engine.subprocess_main`, and watches it by a process descriptor."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._process_fd = -1
        self._directory = ""
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._closed = False
        self._ended = False
        self._starting = threading.Lock()
        self._send_lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`; None while it runs."""
        return self._process.returncode if self._process else None

    def start(self) -> None:
        with self._starting:
            if self._closed:
                raise EngineDeadError("the engine was shut down")
            self._directory = _socket_directory()
            self._context = zmq.Context()
            self._commands, self._outputs = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
            for socket, name in ((self._commands, "commands"), (self._outputs, "outputs")):
                socket.set_hwm(0)
                socket.bind(f"ipc://{self._directory}/{name}")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "interlace.engine.subprocess_main", self._directory], stdin=subprocess.PIPE
            )
            self._process_fd = os.pidfd_open(self._process.pid)
            listening = zmq.Poller()  # or gone
            listening.register(self._commands, zmq.POLLOUT)
            listening.register(self._process_fd, zmq.POLLIN)
            listening.poll()

    def send(self, message: bytes) -> None:
        with self._send_lock:
            if self._closed or self._process is None:
                raise ConnectionError("the link is closed")
            try:
                self._commands.send(message, zmq.NOBLOCK)
            except zmq.Again:  # there is no limit to what may wait, so nobody listens: it has died this very moment
                raise ConnectionError("nobody listens any more") from None

    def receive(self, timeout_s: float | None) -> list[bytes]:
        if self._ended:
            raise EOFError
        poller = zmq.Poller()
        poller.register(self._outputs, zmq.POLLIN)
        poller.register(self._process_fd, zmq.POLLIN)
        events = dict(poller.poll(None if timeout_s is None else round(1000 * timeout_s)))
        self._ended = self._process_fd in events
        messages = []
        while self._outputs.poll(100 if self._ended else 0):  # what a dying child still said comes first
            messages.append(self._outputs.recv())
        if self._ended and self._process is not None:
            self._process.wait()
            if not messages:
                raise EOFError
        return messages

    def obituary(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        return f"{f'was killed by signal {-code}' if code < 0 else f'ended with status {code}'} without a word"

    def interrupt(self) -> None:
        """It prints the stacks of its threads, whatever they are doing, and ends."""
        if self._process is not None:
            self._process.send_signal(signal.SIGABRT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        if self._process is not None:
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return False
        return True

    def close(self) -> None:
        self.kill()  # for a `start` that waits
        with self._starting, self._send_lock:
            if self._closed:
                return
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                assert self._process.stdin is not None
                self._process.stdin.close()
            if self._process_fd >= 0:
                os.close(self._process_fd)
            if self._context is not None:
                self._commands.close(linger=0)
                self._outputs.close(linger=0)
                self._context.term()
            if self._directory:
                shutil.rmtree(self._directory, ignore_errors=True)


def _socket_directory() -> str:
    """A new directory of mode 0700, where sockets may have their names: those are limited to about 107 characters."""
    directory = tempfile.mkdtemp(prefix="interlace-")
    if len(f"{directory}/commands") > zmq.IPC_PATH_MAX_LEN:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="interlace-", dir="/tmp")
    return directory
