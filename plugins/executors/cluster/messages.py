"""What the executor, or an engine's front, and the launcher say to each other: msgpack of these types over a socket
pair.

`Launch` is first. It is answered by `Placed` or `Refused`. Later the executor may ask `Why` a rank is gone; the
launcher says `Gone` as soon as Ray knows, asked or not. The end of the executor's side of the socket ends everything.
"""

from __future__ import annotations

from typing import Any

import msgspec

from interlace.remote_error import RemoteError
from interlace.spec import ResolvedSpec


class Launch(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Connect to a cluster, or start one, and place the ranks."""

    spec: ResolvedSpec
    options: dict[str, Any]
    """`RayOptions`, as plain data."""
    folder: str
    """Where a cluster of our own keeps its files; empty where there is one to connect to."""
    log_level: int
    whole_engine: bool = False
    """Place one engine with all its ranks, not the ranks of an engine that is here."""


class Why(msgspec.Struct, frozen=True, tag=True):
    """A rank has closed its connection without a word: what does Ray say?"""

    rank: int


ToLauncher = Launch | Why


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank listens."""

    host: str
    port: int
    key: bytes
    """The first bytes a rank accepts; known to whoever Ray let in."""
    pid: int
    node_id: str
    store_port: int = 0
    """Where this rank serves the store in which all ranks find each other; 0: it serves none."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"pid {self.pid} on node {self.host}"


class RankSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told before the executor connects."""

    spec: ResolvedSpec
    options: dict[str, Any]
    rank: int
    store: str
    """`host:port` of the store; empty where there is one rank."""
    index_on_node: int
    """Which of the ranks on its node it is."""
    num_on_node: int
    log_level: int


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is told before its front connects."""

    sharers: int
    """How many engines are reckoned to be on its node."""
    start_timeout_s: float


class Placed(msgspec.Struct, frozen=True, tag=True):
    """All ranks listen; in order."""

    seats: list[Seat]


class Gone(msgspec.Struct, frozen=True, tag=True):
    """A rank's actor has ended, or is taken to have."""

    rank: int
    text: str
    """The best that is known of the reason; empty if it ended by itself."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The ranks cannot be placed."""

    error: RemoteError


FromLauncher = Placed | Gone | Refused

encode = msgspec.msgpack.Encoder().encode
decode_to_launcher = msgspec.msgpack.Decoder(ToLauncher).decode
decode_from_launcher = msgspec.msgpack.Decoder(FromLauncher).decode
