"""What travels between a front and an engine in a child process: msgpack of these types, one per ZMQ message."""

from __future__ import annotations

import builtins
import traceback
from typing import Any

import msgspec

from interlace import errors
from interlace.engine.loop import Command
from interlace.errors import EngineDeadError, InterlaceError
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import StepOutput


class RemoteError(msgspec.Struct, frozen=True):
    """An exception of the child, as text."""

    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> RemoteError:
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def rebuild(self) -> Exception:
        """The same exception type with the same text where Interlace or Python define it, with the child's traceback
        as its cause; otherwise `EngineDeadError`."""
        known = getattr(errors, self.type, None) or getattr(builtins, self.type, None)
        rebuilt: Exception
        try:
            if not (isinstance(known, type) and issubclass(known, Exception)):
                raise TypeError
            rebuilt = known(self.message)
            if str(rebuilt) != self.message:  # KeyError puts quotes round its text, again
                raise TypeError
        except TypeError:
            rebuilt = EngineDeadError(f"{self.type}: {self.message}")
        rebuilt.__cause__ = RemoteTraceback(f"\n{self.traceback}")
        return rebuilt


class RemoteTraceback(InterlaceError):
    """Carries the traceback text of another process; only ever the cause of another exception."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine has started."""

    info: ExecutorInfo


class Output(msgspec.Struct, frozen=True, tag=True):
    """A step's news."""

    output: StepOutput


class Event(msgspec.Struct, frozen=True, tag=True):
    """An executor event, progress of loading included."""

    event: ExecutorEvent


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Control`."""

    call_id: int
    value: Any = None
    error: RemoteError | None = None


class Died(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or stopped by itself; the last message of a child."""

    error: RemoteError


FromEngine = Ready | Output | Event | Reply | Died

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
