"""`ProcessClient`: the engine in a process of its own, wherever a link leads to.

Commands and outputs are msgpack. The link carries them, and says when the process is gone (`interfaces/host.py`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from concurrent.futures import Future

import msgspec

from interlace.engine.client import OnDeath, OnEvent, OnOutput
from interlace.engine.command_client import CommandClient
from interlace.engine.loop import Command, Control, Stop
from interlace.engine.wire import Died, Event, Logged, Output, Ready, Reply, decode_from_engine, encode
from interlace.errors import EngineDeadError
from interlace.interfaces.executor import ExecutorInfo
from interlace.interfaces.host import EngineLink
from interlace.remote_error import RemoteError
from interlace.spec import ResolvedSpec

logger = logging.getLogger("interlace.engine")

STOP_TIMEOUT = 10.0
"""Seconds an engine is given to end by itself before it is killed."""
ABORT_TIMEOUT = 2.0
"""Seconds a frozen engine is given to write down what its threads are doing before it is killed."""
PING = -1
"""Call id of a question nobody waits for."""


class ProcessClient(CommandClient):
    """Starts and supervises one engine process. Its death reaches `on_death` with the engine's exception chained."""

    def __init__(self, spec: ResolvedSpec, link: EngineLink) -> None:
        """`link` is not started; from here on it belongs to the client."""
        super().__init__()
        self._spec = spec
        self._link = link
        self._thread: threading.Thread | None = None
        self._started = False
        self._closing = False
        self._closing_lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, where it runs; for supervision and tests."""
        return self._link.pid

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        self._started = True
        try:
            self._link.start()
        except BaseException:
            self._link.close()
            raise
        ready: Future[ExecutorInfo] = Future()
        self._thread = threading.Thread(
            target=self._receive, args=(ready, on_output, on_death, on_event), name="interlace-client", daemon=True
        )
        try:
            self._send_setup()
            self._thread.start()
            info = ready.result()
        except BaseException:
            self.shutdown()
            raise
        if self._link.place:
            logger.info("%s has started (pid %d)", self._name, self._link.pid)
        return info

    def _send_setup(self) -> None:
        """Tell the engine what it is to run; if it is gone already, `_receive` will say so."""
        level = logging.getLogger("interlace").getEffectiveLevel()
        try:
            self._link.send(msgspec.msgpack.encode((self._spec, level)))
        except ConnectionError:
            logger.debug("the engine process ended before it was told what to run")

    def _receive(
        self, ready: Future[ExecutorInfo], on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None
    ) -> None:
        """Hand on what the engine says, until it is gone."""
        try:
            cause = self._listen(ready, on_output, on_event)
        except Exception as error:  # the front's own: it no longer hears the engine, which is then of no use
            cause = error
            self._link.kill()
            self._link.wait(STOP_TIMEOUT)
        self._end(ready, cause, on_death)

    def _listen(self, ready: Future[ExecutorInfo], on_output: OnOutput, on_event: OnEvent | None) -> Exception | None:
        """Until the engine is gone; returns what it died of, if it said so."""
        cause: Exception | None = None
        silences = 0
        with contextlib.suppress(EOFError):
            while True:
                messages = self._link.receive(self._patience(silences) if ready.done() else None)
                silences = 0 if messages else silences + 1
                if silences:
                    cause = self._break_silence(silences) or cause
                for message in messages:
                    match decode_from_engine(message):
                        case Output(output=output):
                            on_output(output)
                        case Ready(info=info):
                            ready.set_result(info)
                        case Event(event=event):
                            if on_event is not None:
                                on_event(event)
                        case Reply(call_id=call_id, value=value, error=error):
                            self._calls.resolve(call_id, value, error.rebuild() if error else None)
                        case Logged(logger=name, level=level, text=text):
                            logging.getLogger(name).log(level, "(%s) %s", self._name, text)
                        case Died(error=error):
                            cause = self._located(error).rebuild()
        return cause

    @property
    def _name(self) -> str:
        """Of the engine, for the log."""
        number = f" {self._spec.replica}" if self._spec.num_replicas > 1 else ""
        return f"engine{number}{f' on {self._link.place}' if self._link.place else ''}"

    def _located(self, error: RemoteError) -> RemoteError:
        """What went wrong on another machine has to do with that machine as a rule: a missing file, no memory."""
        if not self._link.place:
            return error
        return msgspec.structs.replace(error, message=f"{error.message} (said on {self._link.place})")

    def _patience(self, silences: int) -> float:
        """Seconds to listen for a sign of life before the next thing is done about there being none."""
        return self._spec.step_timeout_s if silences < 2 else ABORT_TIMEOUT

    def _break_silence(self, silences: int) -> Exception | None:
        """The engine has said nothing for a long time. It ends hung steps by itself, so first it is asked. If even that
        is not answered it is frozen as a whole (stopped, or native code never lets Python on), and is ended."""
        if silences == 1:
            with contextlib.suppress(EngineDeadError):
                self._send(Control(PING, "health"))
            return None
        # The first often makes it say what its threads are doing; the second always works.
        (self._link.interrupt if silences == 2 else self._link.kill)()
        return TimeoutError(
            f"it answered nothing for {self._spec.step_timeout_s:g} s (engine.step_timeout_s) and was ended"
        )

    def _end(self, ready: Future[ExecutorInfo], cause: Exception | None, on_death: OnDeath) -> None:
        """The engine is gone: tell everyone who waits."""
        if cause is not None:
            text = f"the engine process stopped: {cause}"
        elif self._closing:
            text = "the engine was shut down"
        else:
            text = f"the engine process ({self._whereabouts}) {self._link.obituary()}"
        death = self._died(EngineDeadError(text), cause)
        if not ready.done():
            ready.set_exception(cause or death)
        elif not self._closing:
            on_death(death)

    @property
    def _whereabouts(self) -> str:
        return f"pid {self._link.pid}{f' on {self._link.place}' if self._link.place else ''}"

    def _send(self, command: Command) -> None:
        if not self._started:
            raise EngineDeadError("the engine was not started")
        try:
            self._link.send(encode(command))
        except ConnectionError:
            gone = "the engine was shut down" if self._closing else f"the engine process ({self._whereabouts}) is gone"
            raise EngineDeadError(gone) from None

    def shutdown(self) -> None:
        with self._closing_lock:
            if not self._started or self._closing:
                return
            self._closing = True
        thread = self._thread
        if thread is not None and thread.ident is not None:
            with contextlib.suppress(EngineDeadError):
                self._post(Stop())
            if not self._link.wait(STOP_TIMEOUT):
                self._link.kill()
            if thread is not threading.current_thread():
                thread.join()
        self._link.close()
