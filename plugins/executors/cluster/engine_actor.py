"""`EngineActor`: a whole engine, core and ranks, in an actor of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from interlace.clock import MonotonicClock
from interlace.interfaces.host import serve_engine
from interlace.plugins.executors.cluster.actor import Listening
from interlace.plugins.executors.cluster.carrier import TcpConnection, ask_time
from interlace.plugins.executors.cluster.messages import EngineSetup
from interlace.plugins.executors.cluster.options import RayOptions

if TYPE_CHECKING:
    from interlace.spec import ResolvedSpec


class EngineActor(Listening):
    """`open`, then `serve`, which returns when the engine has ended. Both run in the main thread of the actor."""

    def open(self) -> bytes:
        """Listen for the front; an encoded `Seat`."""
        return self._listen()

    def serve(self, setup: bytes) -> None:
        """Run the engine until its front has had enough of it, or has gone. What goes wrong is said there."""
        told = msgspec.msgpack.decode(setup, type=EngineSetup)
        connection = self._accept(told.start_timeout_s)
        offset = ask_time(connection, MonotonicClock())

        def settle(spec: ResolvedSpec) -> ResolvedSpec:
            return RayOptions(**spec.executor.options).settle(spec, told.sharers)

        serve_engine(TcpConnection(connection, offset), settle)
