"""The process of one rank: `python -m interlace.plugins.executors.processes.child SOCKET PARENT_PID`.

`SOCKET` is an inherited file descriptor. The first message on it is a `Setup`; all others come over the ring.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys

import msgspec

from interlace.interfaces.executor import ExecutorEvent
from interlace.plugins.executors.processes.channel import Channel
from interlace.plugins.executors.processes.ring import RingReader, Seat
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.meeting import Rendezvous, lost_a_peer
from interlace.plugins.executors.ranks.runner import RankRunner
from interlace.remote_error import RemoteError
from interlace.spec import ResolvedSpec
from interlace.worker.place import Place

_PR_SET_PDEATHSIG = 1
STACKS_SIGNAL = signal.SIGUSR1
"""Makes a rank write down the Python stacks of its threads, whatever they are doing."""


class Setup(msgspec.Struct, frozen=True):
    """What a rank is told first."""

    spec: ResolvedSpec
    place: Place
    seat: Seat
    meeting: Rendezvous
    log_level: int
    stacks: int = -1
    """Descriptor of the file that `STACKS_SIGNAL` writes to."""


class _LogOverChannel(logging.Handler):
    """The log of a rank is the log of its executor."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(wire.encode(wire.Logged(record.name, record.levelno, self.format(record))))


def main(descriptor: int, parent: int) -> int:
    """Serve one rank until told to stop; the status of the process."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the executor's process decides when it ends
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()  # a crash in native code leaves the Python stacks on stderr
    channel = Channel(descriptor)
    try:
        setup = msgspec.msgpack.decode(channel.receive(), type=Setup)
        faulthandler.register(STACKS_SIGNAL, file=setup.stacks, all_threads=True)
        # What all ranks have to say alike is heard from the first one.
        level = setup.log_level if setup.place.rank == 0 else max(setup.log_level, logging.ERROR)
        logging.basicConfig(level=level, handlers=[_LogOverChannel(channel)], format="%(message)s")
        _serve(channel, setup)
    except BaseException as error:
        channel.send(wire.encode(wire.Failed(RemoteError.of(error), lost_a_peer(error))))
        return 1
    return 0


def _serve(channel: Channel, setup: Setup) -> None:
    place = setup.place
    if place.cores:
        os.sched_setaffinity(0, place.cores)  # before torch is imported, which makes threads
    ring = RingReader(setup.seat)

    def tell(event: ExecutorEvent) -> None:
        if place.rank == 0:
            channel.send(wire.encode(wire.Happened(event)))

    runner = RankRunner(setup.spec, place, setup.meeting, tell)
    gc.disable()  # imports and loading make objects that stay; looking through them for garbage is for nothing
    while not runner.stopped:
        answer = runner.handle(ring.read())
        if answer is not None:
            channel.send(answer)
        if runner.started and not gc.isenabled():
            gc.freeze()
            gc.enable()


def _die_with(parent: int) -> None:
    """Be killed when the executor is gone, even if this process is stopped or stuck in native code then.

    The kernel watches the thread that started this process; `RankProcesses` keeps it for as long as there are ranks."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        os._exit(1)


if __name__ == "__main__":
    status = main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch's threads and sockets need no farewell
