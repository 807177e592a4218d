"""The launcher: `python -m interlace.plugins.executors.cluster.launcher SOCKET`, a child of the process whose ranks or
engine it places.

The only process that speaks to Ray. Ray's library keeps threads, signal handlers and one connection for a whole
process, and ends it when the cluster is gone; none of that should happen to an engine, or to a user's program.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import threading

import msgspec

from interlace.plugins.executors.cluster.actor import RankActor
from interlace.plugins.executors.cluster.engine_actor import EngineActor
from interlace.plugins.executors.cluster.launching import Launcher
from interlace.plugins.executors.cluster.messages import EngineSetup, Launch, RankSetup, Why, decode_to_launcher
from interlace.plugins.executors.cluster.placement import Room, count_nodes, deal_seats
from interlace.plugins.executors.processes.channel import Channel, MessageReader

FAREWELL_S = 8.0
"""How long an orderly end may take once the executor has gone."""


class RankLauncher(Launcher):
    """Places the ranks of one executor."""

    def _place(self) -> None:
        options, spec = self._options, self._launch.spec
        bundle, world = options.resources(spec), options.world
        ranks = f"{world} ranks" if world > 1 else "the rank"
        parallel = f"tensor_parallel = {options.tensor_parallel} x pipeline_parallel = {options.pipeline_parallel}"
        room = Room(f"{ranks} ({parallel})", "rank", world, bundle, options)
        self._start_actors(RankActor, room, bundle)
        self._await_seats(
            [each.open.remote(world, world > 1 and rank == 0) for rank, each in enumerate(self._actors)], "a rank"
        )
        first = self._seats[0]
        host = f"[{first.host}]" if ":" in first.host else first.host
        store = f"{host}:{first.store_port}" if first.store_port else ""
        dealt = deal_seats([seat.node_id for seat in self._seats])
        for rank, (each, (index, count)) in enumerate(zip(self._actors, dealt, strict=True)):
            setup = RankSetup(
                spec=spec,
                options=self._launch.options,
                rank=rank,
                store=store,
                index_on_node=index,
                num_on_node=count,
                log_level=self._launch.log_level,
            )
            self._serving.append(each.serve.remote(msgspec.msgpack.encode(setup)))


class EngineLauncher(Launcher):
    """Places one engine, which has all its ranks with it."""

    def _place(self) -> None:
        options, spec = self._options, self._launch.spec
        bundle = options.engine_resources(spec)
        name = f"engine {spec.replica} of {spec.num_replicas}" if spec.num_replicas > 1 else "the engine"
        self._start_actors(EngineActor, Room(name, "engine", 1, bundle, options), bundle)
        (actor,) = self._actors
        self._await_seats([actor.open.remote()], name)
        sharers = -(-spec.num_replicas // max(1, count_nodes(bundle)))
        setup = EngineSetup(sharers=sharers, start_timeout_s=options.start_timeout_s)
        self._serving.append(actor.serve.remote(msgspec.msgpack.encode(setup)))


def _listen(descriptor: int, questions: queue.SimpleQueue[Why | None], folder: str) -> None:
    """Queue what the executor asks. When it has gone, an end that does not come in good order comes all the same."""
    reader = MessageReader(socket.socket(fileno=os.dup(descriptor)))
    try:
        while True:
            for message in reader.read():
                question = decode_to_launcher(message)
                assert isinstance(question, Why)
                questions.put(question)
    except (EOFError, OSError):
        questions.put(None)
    threading.Event().wait(FAREWELL_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(descriptor: int) -> int:
    """Serve one executor or engine; the status of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the executor's process decides when it ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(descriptor)
    launch = decode_to_launcher(channel.receive())
    assert isinstance(launch, Launch)
    questions: queue.SimpleQueue[Why | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(descriptor, questions, launch.folder), daemon=True).start()
    launcher = EngineLauncher if launch.whole_engine else RankLauncher
    launcher(launch, channel).run(questions)
    return 0


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Ray's threads need no farewell
