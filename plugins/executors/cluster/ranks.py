"""`ClusterRanks`: the ranks of one executor on a cluster, from their start to their end; the executor's side.

The launcher, a child process, places them. One thread hears the ranks and the launcher.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

from msgspec.structs import replace

from interlace.clock import Clock
from interlace.errors import InterlaceError
from interlace.plugins.executors.cluster.launch import LauncherProcess
from interlace.plugins.executors.cluster.messages import Gone, Launch, Placed, Refused, Seat, Why
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.cluster.tcp import connect, read_all
from interlace.plugins.executors.processes.channel import MessageReader, frame
from interlace.plugins.executors.processes.processes import StepWatch
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.blame import PATIENCE, Sort, Trouble, blame
from interlace.plugins.executors.ranks.ledger import StepLedger
from interlace.remote_error import RemoteTraceback
from interlace.spec import ResolvedSpec

EXPLANATION_TIMEOUT = 6.0
"""Seconds the launcher is given to find out why a rank is gone."""
CONNECT_TIMEOUT = 10.0
STACKS_TIMEOUT = 1.0

OnEvent = Callable[[wire.Happened | wire.Logged], None]
OnDeath = Callable[[BaseException], None]


class _Rank:
    """The connection to one rank."""

    def __init__(self, number: int, seat: Seat) -> None:
        self.number = number
        self.seat = seat
        self.name = f"rank {number} (pid {seat.pid} on node {seat.host})"
        self.gone = False
        self.complained = False
        """Whether it has said what is wrong with it; then nobody needs to ask why it is gone."""
        try:
            self.socket = connect(seat, CONNECT_TIMEOUT)
        except OSError as error:
            raise InterlaceError(
                f"{self.name} cannot be reached at port {seat.port} ({error}): the machines of a cluster must reach "
                "each other on all ports"
            ) from error
        self.reader = MessageReader(self.socket)

    def hear(self) -> list[wire.FromRank]:
        """What it has said; blocks if that is nothing and it has not gone."""
        try:
            return [wire.decode_from_rank(message) for message in self.reader.read()]
        except (EOFError, OSError):
            self.gone = True
            return []


class ClusterRanks:
    """`start`, then `send` from one thread; `stop` from any. What ranks answer goes into `ledger`, and so does their
    end. `on_event` and `on_death` are called from a thread of its own."""

    def __init__(
        self,
        spec: ResolvedSpec,
        options: RayOptions,
        ledger: StepLedger,
        on_event: OnEvent,
        on_death: OnDeath,
        clock: Clock,
    ) -> None:
        """`on_death`: ranks that were ready cannot go on."""
        self._spec = spec
        self._options = options
        self._ledger = ledger
        self._on_event = on_event
        self._on_death = on_death
        self._clock = clock
        self._ranks: list[_Rank] = []
        self._explained: set[int] = set()  # ranks of which the launcher has told what became of them
        self._stopping = False
        self._give_up: str | None = None
        self._wake = os.eventfd(0)
        self._launcher = LauncherProcess(own_cluster=not options.address)
        self._thread = threading.Thread(target=self._run, name="interlace-ranks", daemon=True)

    @property
    def seats(self) -> list[Seat]:
        """Where the ranks are, in order."""
        return [rank.seat for rank in self._ranks]

    @property
    def launcher_pid(self) -> int:
        """Process id of the child that speaks to Ray."""
        return self._launcher.pid

    def start(self) -> None:
        """Place all ranks and connect to them; they then wait for messages. Raises the true cause if that fails."""
        level = logging.getLogger("interlace").getEffectiveLevel()
        options = self._options.model_dump()
        launch = Launch(spec=self._spec, options=options, folder=self._launcher.folder, log_level=level)
        self._launcher.send(launch)
        for number, seat in enumerate(self._placed()):
            self._ranks.append(_Rank(number, seat))
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Hand a message to all ranks. If one is gone it does not hear it; `ledger` knows why."""
        framed = frame(message)
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.socket.sendall(framed)

    def give_up(self, why: str) -> None:
        """End all ranks with an error that says `why` and what they were doing; `ledger` hears of it."""
        self._give_up = why
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End all ranks and free everything; a cluster that was not started here goes on. Once only."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._part()
        self._launcher.stop()
        if self._thread.ident is not None:
            self._thread.join()
        for rank in self._ranks:
            rank.socket.close()
        self._launcher.release()
        os.close(self._wake)

    def _placed(self) -> list[Seat]:
        while True:
            for said in self._launcher.read():
                match said:
                    case Placed(seats=seats):
                        return seats
                    case Refused(error=error):
                        raise error.rebuild()
                    case Gone(rank=rank, text=text):
                        raise InterlaceError(f"rank {rank} was lost while the others were placed: {text}")

    def _part(self) -> None:
        """Close all connections: ranks end by themselves, and the ledger's thread has nothing left to send to."""
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.socket.shutdown(socket.SHUT_RDWR)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        error: BaseException | None
        try:
            error = self._listen()
        except Exception as own:  # ranks that are not heard, or a launcher that is gone
            error = own
        if self._stopping or error is None:
            return
        self._part()
        self._ledger.fail(error)
        if self._ledger.started:
            self._on_death(error)

    def _listen(self) -> BaseException | None:
        """Until all are to end (None), or one cannot go on (the reason)."""
        watch = StepWatch(self._ledger, self._clock, self._spec.step_timeout_s)
        while not self._stopping:
            if found := list(self._heard(watch.interval)):
                return self._find_cause(found)
            if self._give_up is not None:
                return self._describe_hang(self._give_up)
            if hung := watch.look():
                return self._describe_hang(hung)
        return None

    def _heard(self, timeout: float) -> Iterator[Trouble]:
        """Wait until somebody says something; the troubles in all that is said by then."""
        poller = select.poll()
        by_descriptor = {rank.socket.fileno(): rank for rank in self._ranks if not rank.gone}
        for descriptor in (*by_descriptor, self._launcher.fileno(), self._wake):
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(1000 * timeout):
            if descriptor in by_descriptor:
                yield from self._hear(by_descriptor[descriptor])
            elif descriptor == self._wake:
                os.eventfd_read(self._wake)
            else:
                for said in self._launcher.read():
                    if isinstance(said, Gone) and (trouble := self._lost(said)) is not None:
                        yield trouble

    def _hear(self, rank: _Rank) -> Iterator[Trouble]:
        for said in rank.hear():
            if isinstance(said, wire.Happened | wire.Logged):
                self._on_event(said)
                continue
            if isinstance(said, wire.Failed):  # of its node, as a rule: a missing file, no memory
                error = replace(said.error, message=f"{said.error.message} (said by {rank.name})")
                said = replace(said, error=error)
            if (trouble := self._ledger.answer(rank.number, said)) is not None:
                rank.complained = True
                yield trouble
        if rank.gone and not rank.complained:
            yield Trouble(rank.number, InterlaceError(f"{rank.name} has closed its connection"), Sort.ENDED)

    def _find_cause(self, found: list[Trouble]) -> BaseException:
        """The error to tell, once nothing likelier to be the cause is to be expected."""
        began = self._clock.now()
        asked: dict[int, float] = {}
        while True:
            cause = blame(found)
            until = began + PATIENCE[cause.sort]
            if cause.sort >= Sort.ENDED:
                self._ask_why(asked)
                answers = [when + EXPLANATION_TIMEOUT for rank, when in asked.items() if rank not in self._explained]
                until = max([until, *answers])
            left = until - self._clock.now()
            if left <= 0 or self._stopping:
                return self._named(cause)
            found += self._heard(left)

    def _ask_why(self, asked: dict[int, float]) -> None:
        """Ask the launcher why ranks are gone that said nothing; where none is, it may know of one that complained."""
        lost = [rank for rank in self._ranks if rank.gone]
        for rank in [rank for rank in lost if not rank.complained] or lost:
            if rank.number not in asked:
                asked[rank.number] = self._clock.now()
                self._launcher.send(Why(rank.number))

    def _lost(self, gone: Gone) -> Trouble | None:
        """What is known of a rank that is gone, None if that is nothing new."""
        rank = self._ranks[gone.rank]
        self._explained.add(gone.rank)
        if rank.complained and not gone.text:
            return None
        error = InterlaceError(f"{rank.name} is gone: {gone.text or 'it ended by itself'}")
        return Trouble(gone.rank, error, Sort.ENDED if rank.complained else Sort.KILLED)

    def _named(self, trouble: Trouble) -> BaseException:
        """The error with the rank it comes from, where there is more than one."""
        if len(self._ranks) == 1 or not self._ledger.started or trouble.error.__cause__ is None:
            return trouble.error
        rank = self._ranks[trouble.rank]
        named = InterlaceError(f"{rank.name} failed: {type(trouble.error).__name__}: {trouble.error}")
        named.__cause__ = trouble.error
        return named

    def _describe_hang(self, why: str) -> BaseException:
        """An error that says where every rank is."""
        parts = []
        for rank in self._ranks:
            text = read_all(rank.seat, STACKS_TIMEOUT) or "it did not answer: it is stopped, or in native code\n"
            parts.append(f"{rank.name}:\n{text}")
        error = TimeoutError(why)
        error.__cause__ = RemoteTraceback("\n" + "\n".join(parts))
        return error
