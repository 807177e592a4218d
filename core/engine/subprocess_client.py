"""`SubprocessClient`: the engine in a child process of its own, so that a busy front does not slow its steps.

Commands and outputs are msgpack over two ZMQ ipc sockets in a directory only this user can enter. All waits block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future

import msgspec
import zmq

from interlace.engine.client import OnDeath, OnEvent, OnOutput
from interlace.engine.command_client import CommandClient
from interlace.engine.loop import Command, Control, Stop
from interlace.engine.wire import Died, Event, Output, Ready, Reply, decode_from_engine, encode
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import ExecutorInfo
from interlace.spec import ResolvedSpec

logger = logging.getLogger("interlace.engine")

STOP_TIMEOUT = 10.0
"""Seconds a child is given to end by itself before it is killed."""
ABORT_TIMEOUT = 2.0
"""Seconds a frozen child is given to write down what its threads are doing before it is killed."""
PING = -1
"""Call id of a question nobody waits for."""


class SubprocessClient(CommandClient):
    """Starts and supervises one engine process. Its death reaches `on_death` with the child's exception chained."""

    def __init__(self, spec: ResolvedSpec) -> None:
        super().__init__()
        self._spec = spec
        self._send_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._closing_lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, for supervision and tests."""
        return self._process.pid if self._process else None

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self._directory = _socket_directory()
        self._context = zmq.Context()
        self._commands, self._outputs = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        try:
            for socket, name in ((self._commands, "commands"), (self._outputs, "outputs")):
                socket.set_hwm(0)
                socket.bind(f"ipc://{self._directory}/{name}")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "interlace.engine.subprocess_main", self._directory], stdin=subprocess.PIPE
            )
        except BaseException:
            self._release()
            raise
        ready: Future[ExecutorInfo] = Future()
        self._thread = threading.Thread(
            target=self._receive, args=(ready, on_output, on_death, on_event), name="interlace-client", daemon=True
        )
        try:
            self._send_setup()
            self._thread.start()
            return ready.result()
        except BaseException:
            self.shutdown()
            raise

    def _send_setup(self) -> None:
        """Tell the child what it is to run, once it listens; if it ends before that, `_receive` will say so."""
        assert self._process is not None
        level = logging.getLogger("interlace").getEffectiveLevel()
        process_fd = os.pidfd_open(self._process.pid)
        try:
            poller = zmq.Poller()
            poller.register(self._commands, zmq.POLLOUT)
            poller.register(process_fd, zmq.POLLIN)
            if self._commands in dict(poller.poll()):
                self._commands.send(msgspec.msgpack.encode((self._spec, level)), zmq.NOBLOCK)
        except zmq.Again:
            logger.debug("the engine process ended before it was told what to run")
        finally:
            os.close(process_fd)

    def _receive(
        self, ready: Future[ExecutorInfo], on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None
    ) -> None:
        """Hand on what the child says, until it is gone."""
        assert self._process is not None
        process_fd = os.pidfd_open(self._process.pid)
        try:
            cause = self._listen(process_fd, ready, on_output, on_event)
        except Exception as error:  # the front's own: it no longer hears the engine, which is then of no use
            cause = error
            self._process.kill()
        os.close(process_fd)
        self._process.wait()
        self._end(ready, cause, on_death)

    def _listen(
        self, process_fd: int, ready: Future[ExecutorInfo], on_output: OnOutput, on_event: OnEvent | None
    ) -> Exception | None:
        """Until the child is gone; returns what it died of, if it said so."""
        poller = zmq.Poller()
        poller.register(self._outputs, zmq.POLLIN)
        poller.register(process_fd, zmq.POLLIN)
        cause: Exception | None = None
        alive, silences = True, 0
        while alive:
            events = dict(poller.poll(self._patience(silences) if ready.done() else None))
            silences = 0 if events else silences + 1
            if silences:
                cause = self._break_silence(silences) or cause
            alive = process_fd not in events
            while self._outputs.poll(0 if alive else 100):  # what a dying child still said comes first
                match decode_from_engine(self._outputs.recv()):
                    case Output(output=output):
                        on_output(output)
                    case Ready(info=info):
                        ready.set_result(info)
                    case Event(event=event):
                        if on_event is not None:
                            on_event(event)
                    case Reply(call_id=call_id, value=value, error=error):
                        self._calls.resolve(call_id, value, error.rebuild() if error else None)
                    case Died(error=error):
                        cause = error.rebuild()
        return cause

    def _patience(self, silences: int) -> int:
        """Milliseconds to listen for a sign of life before the next thing is done about there being none."""
        return round(1000 * (self._spec.step_timeout_s if silences < 2 else ABORT_TIMEOUT))

    def _break_silence(self, silences: int) -> Exception | None:
        """The child has said nothing for a long time. It ends hung steps by itself, so first it is asked. If even that
        is not answered it is frozen as a whole (stopped, or native code never lets Python on), and is ended."""
        assert self._process is not None
        if silences == 1:
            self._send(Control(PING, "health"))
            return None
        # The first signal makes it print the stacks of its threads, whatever they are doing; the second always works.
        self._process.send_signal(signal.SIGABRT if silences == 2 else signal.SIGKILL)
        return TimeoutError(
            f"it answered nothing for {self._spec.step_timeout_s:g} s (engine.step_timeout_s) and was ended"
        )

    def _end(self, ready: Future[ExecutorInfo], cause: Exception | None, on_death: OnDeath) -> None:
        """The child is gone: tell everyone who waits."""
        assert self._process is not None
        code = self._process.returncode
        if cause is not None:
            text = f"the engine process stopped: {cause}"
        elif self._closing:
            text = "the engine was shut down"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            text = f"the engine process (pid {self._process.pid}) {how} without a word"
        death = self._died(EngineDeadError(text), cause)
        if not ready.done():
            ready.set_exception(cause or death)
        elif not self._closing:
            on_death(death)

    def _send(self, command: Command) -> None:
        if self._process is None:
            raise EngineDeadError("the engine was not started")
        with self._send_lock:
            if self._commands.closed:
                raise EngineDeadError("the engine was shut down")
            try:
                self._commands.send(encode(command), zmq.NOBLOCK)
            except zmq.Again:  # there is no limit to what may wait, so nobody listens: it has died this very moment
                raise EngineDeadError(f"the engine process (pid {self._process.pid}) is gone") from None

    def shutdown(self) -> None:
        with self._closing_lock:
            if self._process is None or self._closing:
                return
            self._closing = True
        with contextlib.suppress(EngineDeadError):
            self._post(Stop())
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
        thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._release()

    def _release(self) -> None:
        """Free everything but the process and the thread, which are gone."""
        with self._send_lock:
            self._commands.close(linger=0)
        self._outputs.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)


def _socket_directory() -> str:
    """A new directory of mode 0700, where sockets may have their names: those are limited to about 107 characters."""
    directory = tempfile.mkdtemp(prefix="interlace-")
    if len(f"{directory}/commands") > zmq.IPC_PATH_MAX_LEN:
        os.rmdir(directory)
        directory = tempfile.mkdtemp(prefix="interlace-", dir="/tmp")
    return directory
