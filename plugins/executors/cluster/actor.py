"""`RankActor`: one rank as a Ray actor. Ray places it, starts its process and ends it; the executor speaks to it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import sys
import threading
import traceback
from typing import Any

import msgspec

from interlace.interfaces.executor import ExecutorEvent
from interlace.plugins.executors.cluster.messages import RankSetup, Seat
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.cluster.tcp import Listener
from interlace.plugins.executors.processes.channel import Channel, MessageReader
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.meeting import Rendezvous, lost_a_peer
from interlace.plugins.executors.ranks.runner import RankRunner
from interlace.remote_error import RemoteError

LAST_WORDS_S = 10.0
"""How long the executor is given to hear why a rank ends."""


class Listening:
    """An actor that waits for one connection with the key, which is that of whoever it works for. Each later one is
    told what the threads are doing, and closed: that is asked when nothing else is answered."""

    def _listen(self, store_port: int = 0) -> bytes:
        """Listen on this node's address; an encoded `Seat`."""
        import ray

        self._listener = Listener(ray.util.get_node_ip_address())
        seat = Seat(
            host=self._listener.host,
            port=self._listener.port,
            key=self._listener.key,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            store_port=store_port,
        )
        return msgspec.msgpack.encode(seat)

    def _accept(self, timeout_s: float) -> socket.socket:
        connection = self._listener.accept(timeout_s)
        threading.Thread(target=self._tell_stacks, name="interlace-stacks", daemon=True).start()
        return connection

    def _tell_stacks(self) -> None:
        while True:
            with self._listener.accept(None) as connection, contextlib.suppress(OSError):
                connection.sendall(_describe_threads().encode())


class RankActor(Listening):
    """`open`, then `serve`, which returns when the executor has gone. Both run in the main thread of the actor."""

    def __init__(self) -> None:
        self._store: Any = None

    def open(self, num_ranks: int, serves_store: bool) -> bytes:
        """Listen for the executor, and serve the store for `num_ranks` ranks if asked to; an encoded `Seat`."""
        import ray

        host = ray.util.get_node_ip_address()
        if serves_store:
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            self._store = TCPStore(host, 0, num_ranks, True, wait_for_workers=False)
        return self._listen(self._store.port if serves_store else 0)

    def serve(self, setup: bytes) -> None:
        """Carry out what the executor says until it closes the connection. What goes wrong is said there."""
        told = msgspec.msgpack.decode(setup, type=RankSetup)
        options = RayOptions(**told.options)
        connection = self._accept(options.start_timeout_s)
        channel = Channel(os.dup(connection.fileno()))
        # What all ranks have to say alike is heard from the first one.
        level = told.log_level if told.rank == 0 else max(told.log_level, logging.ERROR)
        logging.basicConfig(level=level, handlers=[_LogOverChannel(channel)], format="%(message)s", force=True)
        with connection, contextlib.suppress(EOFError, OSError):  # the executor has gone
            try:
                self._serve(connection, channel, told, options)
            except (EOFError, ConnectionError):
                raise
            except BaseException as error:
                # Ray ends actors whose owner has gone with SystemExit: a consequence, as the loss of a peer is.
                is_secondary = lost_a_peer(error) or isinstance(error, SystemExit)
                channel.send(wire.encode(wire.Failed(RemoteError.of(error), is_secondary)))
                _wait_until_heard(connection)

    def _serve(self, connection: socket.socket, channel: Channel, told: RankSetup, options: RayOptions) -> None:
        place = options.place(told.spec, told.rank, told.index_on_node, told.num_on_node)
        if place.cores:
            os.sched_setaffinity(0, place.cores)  # before torch is imported, which makes threads

        def tell(event: ExecutorEvent) -> None:
            if place.rank == 0:
                channel.send(wire.encode(wire.Happened(event)))

        meeting = Rendezvous(address=told.store, host=self._listener.host, timeout_s=options.start_timeout_s)
        runner = RankRunner(told.spec, place, meeting, tell)
        reader = MessageReader(connection)
        gc.disable()  # imports and loading make objects that stay; looking through them for garbage is for nothing
        try:
            while not runner.stopped:
                for message in reader.read():
                    answer = runner.handle(message)
                    if answer is not None:
                        channel.send(answer)
                if runner.started and not gc.isenabled():
                    gc.freeze()
                    gc.enable()
        finally:
            runner.shutdown()


def _describe_threads() -> str:
    """The Python stacks of all threads but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "".join(parts)


def _wait_until_heard(connection: socket.socket) -> None:
    """Closing a connection with something unread would take back what was said last."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(LAST_WORDS_S)
    while connection.recv(1 << 16):
        pass


class _LogOverChannel(logging.Handler):
    """The log of a rank is the log of its executor."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the executor has gone
            self._channel.send(wire.encode(wire.Logged(record.name, record.levelno, self.format(record))))
