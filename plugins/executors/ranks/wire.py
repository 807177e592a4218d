"""What an executor and its ranks say to each other: msgpack of these types, without pickle.

Every rank is told the same, in the same order. An executor starts its ranks with `Prepare`, takes the least of the
`Prepared` block numbers, and sends it in `Start`. Then come `Step`s and `Control`s; `Stop` is the last.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import SampledTokens, StepPlan, StepResult
from interlace.remote_error import RemoteError


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Join the other ranks and choose everything; answered by `Prepared`."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load the weights and allocate `num_blocks` KV blocks; answered by `Started`."""

    num_blocks: int


class Step(msgspec.Struct, frozen=True, tag=True):
    """Run a step. The rank that samples answers with `Stepped`; any rank that fails with `StepFailed`."""

    plan: StepPlan
    sampled: list[SampledTokens] = []
    """What the ranks that do not sample have not heard of yet; see `interlace.worker.feedback`."""


class Control(msgspec.Struct, frozen=True, tag=True):
    """Run a named operation between two steps; answered by `Controlled`."""

    operation: str
    arguments: dict[str, Any] = {}


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Free everything and end. Not answered."""


ToRank = Prepare | Start | Step | Control | Stop


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The most KV blocks that the rank has room for."""

    num_blocks: int


class Started(msgspec.Struct, frozen=True, tag=True):
    """The rank is ready; what it says of itself."""

    info: ExecutorInfo


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """A step's result."""

    result: StepResult


class StepFailed(msgspec.Struct, frozen=True, tag=True):
    """A step failed as a whole on this rank."""

    step_id: int
    error: RemoteError
    secondary: bool = False
    """Whether it failed because another rank is gone (`PeerLostError`)."""


class Controlled(msgspec.Struct, frozen=True, tag=True):
    """What an operation gave."""

    value: Any = None
    error: RemoteError | None = None


class Happened(msgspec.Struct, frozen=True, tag=True):
    """An event that is no answer: progress of loading."""

    event: ExecutorEvent


class Logged(msgspec.Struct, frozen=True, tag=True):
    """A line for the executor's log."""

    logger: str
    level: int
    text: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The rank cannot start, or cannot go on; its last word."""

    error: RemoteError
    secondary: bool = False
    """As in `StepFailed`."""


FromRank = Prepared | Started | Stepped | StepFailed | Controlled | Happened | Logged | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
