"""What travels between a front and an engine in another process: msgpack of these types, one per message."""

from __future__ import annotations

from typing import Any

import msgspec

from interlace.engine.loop import Command
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import StepOutput
from interlace.remote_error import RemoteError


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


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A log line of an engine on another machine."""

    logger: str
    level: int
    text: str


class Died(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, or stopped by itself; the last message."""

    error: RemoteError


FromEngine = Ready | Output | Event | Reply | Logged | Died

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
