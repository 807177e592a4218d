"""`Launcher`: what speaks to Ray: connecting, placing actors, finding out why one has ended."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from interlace.errors import ConfigError, InterlaceError
from interlace.plugins.executors.cluster.messages import Gone, Launch, Placed, Refused, Seat, Why, encode
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.cluster.placement import Room
from interlace.plugins.executors.cluster.tcp import answers
from interlace.plugins.executors.processes.channel import Channel
from interlace.remote_error import RemoteError

EXPLANATION_S = 2.0
"""How long Ray is given to say why an actor ended."""
OWN_CLUSTER_S = 60.0
"""How much longer than an answer of a running cluster the start of one may take."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Of a cluster of our own: about the least Ray accepts. Nothing of ours goes through it."""


class Launcher(ABC):
    """Connects to the cluster, places actors for one engine, and watches over them."""

    def __init__(self, launch: Launch, channel: Channel) -> None:
        self._launch = launch
        self._options = RayOptions(**launch.options)
        self._channel = channel
        self._room: Room | None = None
        self._actors: list[Any] = []
        self._serving: list[Any] = []
        self._seats: list[Seat] = []

    def run(self, questions: queue.SimpleQueue[Why | None]) -> None:
        """Until the executor has gone (None). What goes wrong before the ranks listen is said to the executor."""
        try:
            try:
                self._connect()
                self._place()
            except BaseException as error:
                self._channel.send(encode(Refused(RemoteError.of(error))))
                return
            self._channel.send(encode(Placed(self._seats)))
            self._watch(questions)
            while (question := questions.get()) is not None:
                self._channel.send(encode(Gone(question.rank, self._explain(question.rank))))
        finally:
            self._stop()

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _connect(self) -> None:
        address = self._options.address
        limit = threading.Timer(self._connect_timeout(), self._give_up)
        limit.daemon = True
        limit.start()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not address:
            cpus = max(
                os.cpu_count() or 1, round(self._options.resources(self._launch.spec)["CPU"]) * self._options.world
            )
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=self._launch.folder,
                **quiet,
            )
        else:
            self._check_address(address)
            try:
                ray.init(address=address, **quiet)
            except Exception as error:
                raise InterlaceError(
                    f"executor option address = '{address}': Ray does not let us in: {type(error).__name__}: {error}"
                ) from error
        limit.cancel()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has set a handler

    def _connect_timeout(self) -> float:
        return self._options.placement_timeout_s + (0.0 if self._options.address else OWN_CLUSTER_S)

    def _give_up(self) -> None:
        """Ray waits for minutes, and in native code; so this is the end of the process."""
        text = f"Ray has not answered within {self._connect_timeout():g} s"
        if self._options.address:
            text = f"executor option address = '{self._options.address}': {text}"
        self._channel.send(encode(Refused(RemoteError.of(InterlaceError(text)))))
        shutil.rmtree(self._launch.folder, ignore_errors=True)
        os._exit(1)

    def _check_address(self, address: str) -> None:
        """Ray itself takes minutes to find out that nobody is there."""
        host, _, port = address.rpartition(":")
        if address == "auto":
            return
        if not host or not port.isdecimal():
            raise ConfigError(
                f"executor option address = '{address}' should be HOST:PORT of a Ray cluster, 'auto', or empty for a "
                "cluster of this machine alone"
            )
        if not answers(host.strip("[]"), int(port), min(5.0, self._options.placement_timeout_s)):
            raise InterlaceError(
                f"executor option address = '{address}': no Ray cluster answers there. Start one (ray start --head "
                "prints its address), or leave the address empty for a cluster of this machine alone"
            )

    @abstractmethod
    def _place(self) -> None:
        """Reserve room, start the actors, and have them listen and serve."""

    def _start_actors(self, kind: type[Any], room: Room, bundle: dict[str, float]) -> None:
        """One in each bundle of `room`."""
        self._room = room
        actor = ray.remote(max_restarts=0, max_task_retries=0)(kind)
        for index in room.bundles:
            where = PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=index)
            cpus, gpus = bundle["CPU"], bundle.get("GPU", 0.0)
            made = actor.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=where).remote()
            self._actors.append(made)

    def _await_seats(self, opened: list[Any], what: str) -> None:
        """Wait until all listen."""
        try:
            seats = ray.get(opened, timeout=self._options.start_timeout_s)
        except ray.exceptions.RayError as error:
            raise InterlaceError(f"{what} cannot be started as a Ray actor: {type(error).__name__}: {error}") from error
        self._seats = [msgspec.msgpack.decode(seat, type=Seat) for seat in seats]

    # ── afterwards ────────────────────────────────────────────────────────────────────────────────────────────

    def _watch(self, questions: queue.SimpleQueue[Why | None]) -> None:
        """What Ray finds out by itself is told, too."""
        for rank, serving in enumerate(self._serving):

            def ask(done: Any, rank: int = rank) -> None:  # in a thread of Ray's
                if done.exception() is not None:
                    questions.put(Why(rank))

            serving.future().add_done_callback(ask)

    def _explain(self, rank: int) -> str:
        """Why a rank has closed its connection; empty if it ended by itself. Ray knows at once of a process that ended;
        of a node only after it has missed heartbeats, so the node is asked whether it is there."""
        done, _ = ray.wait([self._serving[rank]], timeout=EXPLANATION_S)
        if done:
            try:
                ray.get(done)
            except ray.exceptions.ActorUnavailableError:
                pass  # Ray does not know yet
            except Exception as error:
                return _reason(error)
            else:
                return ""
        seat = self._seats[rank]
        for node in ray.nodes():
            if node["NodeID"] == seat.node_id:
                if node["Alive"] and answers(node["NodeManagerAddress"], node["NodeManagerPort"]):
                    return "its connection is broken although its node answers"
                return f"its node {seat.host} (Ray node {seat.node_id[:8]}) is lost: nothing answers there any more"
        return f"its node {seat.host} (Ray node {seat.node_id[:8]}) is no longer part of the cluster"

    def _stop(self) -> None:
        """End what is ours; a cluster that we did not start goes on."""
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
            if self._room is not None:
                self._room.free()
            ray.shutdown()
        if self._launch.folder:
            shutil.rmtree(self._launch.folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What Ray says of a dead actor, in one line without the names of its own things."""
    lines = str(error).splitlines()
    told = [line.strip() for line in lines if line.startswith("The actor ") or "node was terminated" in line]
    return " ".join(told[1:] or told) or f"{type(error).__name__}: {error}"
