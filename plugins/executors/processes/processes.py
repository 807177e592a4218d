"""`RankProcesses`: the processes of one executor, from their start to their end.

One thread starts them, hears them and watches them. The kernel kills a rank when this thread is gone (see `child`), so
ranks outlive neither their executor nor a process that was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec

from interlace.clock import Clock
from interlace.errors import InterlaceError
from interlace.plugins.executors.processes.channel import MessageReader
from interlace.plugins.executors.processes.child import STACKS_SIGNAL, Setup
from interlace.plugins.executors.processes.ring import RingClosedError, RingWriter
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.blame import PATIENCE, Sort, Trouble, blame
from interlace.plugins.executors.ranks.ledger import StepLedger
from interlace.plugins.executors.ranks.meeting import BoardSeat, Rendezvous, make_seats
from interlace.remote_error import RemoteTraceback
from interlace.spec import ResolvedSpec
from interlace.worker.place import Place

RING_BYTES = 4 << 20
"""Plans are some KiB; longer ones pass through in pieces."""
STOP_TIMEOUT = 5.0
"""Seconds ranks are given to end by themselves before they are killed."""
STACKS_TIMEOUT = 0.5
"""Seconds ranks are given to write down their stacks."""
LOOKS = 8
"""Looks at the step under way per timeout."""

OnEvent = Callable[[wire.Happened | wire.Logged], None]
OnDeath = Callable[[BaseException], None]


class _Rank:
    """One process, and what it takes to hear it."""

    def __init__(self, setup: Setup, inherited: Sequence[int]) -> None:
        """`inherited`: descriptors that `setup` refers to, besides the one it adds."""
        self.place = setup.place
        self.heard_all = False
        self.troubled = False
        """Whether it is among the troubles."""
        self.socket, theirs = socket.socketpair()
        self.stacks = os.memfd_create("interlace-stacks")
        self._setup = msgspec.structs.replace(setup, stacks=self.stacks)
        self.reader = MessageReader(self.socket)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", Setup.__module__, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self.stacks, *inherited),
                )
            except BaseException:
                self.socket.close()
                os.close(self.stacks)
                raise
        self.pidfd = os.pidfd_open(self.process.pid)

    def introduce(self) -> None:
        """Tell it who it is. If it has ended already, that is noticed as for any rank."""
        message = msgspec.msgpack.encode(self._setup)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(len(message).to_bytes(8, "little") + message)

    @property
    def name(self) -> str:
        return f"rank {self.place.rank} (pid {self.process.pid})"

    def hear(self) -> list[wire.FromRank]:
        """What it has said; blocks if that is nothing and it has not ended."""
        try:
            return [wire.decode_from_rank(message) for message in self.reader.read()]
        except (EOFError, ConnectionResetError):
            self.heard_all = True
            return []

    def death(self) -> Trouble:
        """What it died of, as far as the system knows; it has said nothing of it."""
        code = self.process.wait()
        if code >= 0:
            error = InterlaceError(f"{self.name} ended with status {code} without a word")
            return Trouble(self.place.rank, error, Sort.ENDED)
        name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
        hint = ": out of memory, unless somebody did it" if -code == signal.SIGKILL else ""
        error = InterlaceError(f"{self.name} was killed by signal {-code} ({name}){hint}")
        return Trouble(self.place.rank, error, Sort.ENDED if -code == signal.SIGABRT else Sort.KILLED)

    def stack_text(self) -> str:
        """What `STACKS_SIGNAL` has made it write."""
        size = os.fstat(self.stacks).st_size
        return os.pread(self.stacks, size, 0).decode("utf-8", "replace")

    def release(self) -> None:
        """Free everything; the process is gone."""
        self.process.wait()
        self.socket.close()
        os.close(self.pidfd)
        os.close(self.stacks)


class RankProcesses:
    """`start`, then `send` from one thread; `stop` from any. What ranks answer goes into `ledger`, and so does their
    end. `on_event` and `on_death` are called from a thread of its own."""

    def __init__(
        self,
        spec: ResolvedSpec,
        places: Sequence[Place],
        ledger: StepLedger,
        on_event: OnEvent,
        on_death: OnDeath,
        clock: Clock,
        *,
        share_memory: bool,
    ) -> None:
        """`on_death`: ranks that were ready cannot go on. `share_memory`: tensor ranks of a stage exchange tensors
        through a board."""
        self._spec = spec
        self._places = places
        self._ledger = ledger
        self._on_event = on_event
        self._on_death = on_death
        self._clock = clock
        self._ring = RingWriter(len(places), RING_BYTES)
        self._file = os.memfd_create("interlace-meeting")
        self._wake = os.eventfd(0)
        self._boards: list[BoardSeat | None] = [None] * len(places)
        if share_memory and places[0].tensor_size > 1:
            self._boards = [seat for _ in range(places[0].num_stages) for seat in make_seats(places[0].tensor_size)]
        self._ranks: list[_Rank] = []
        self._troubles: list[Trouble] = []  # in the order of notice, one per rank
        self._stopping = False
        self._give_up: str | None = None
        self._thread = threading.Thread(target=self._run, name="interlace-ranks", daemon=True)

    @property
    def pids(self) -> list[int]:
        """Process ids in the order of ranks."""
        return [rank.process.pid for rank in self._ranks]

    def start(self) -> None:
        """Start all processes; raises if that is impossible. They then wait for messages."""
        self._spawned: Future[None] = Future()
        self._thread.start()
        self._spawned.result()

    def send(self, message: bytes) -> None:
        """Hand a message to all ranks. If they are gone, or about to be, nobody hears it; `ledger` knows why."""
        with contextlib.suppress(RingClosedError):
            self._ring.write(message)

    def give_up(self, why: str) -> None:
        """End all ranks with an error that says `why` and what they were doing; `ledger` hears of it."""
        self._give_up = why
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End all ranks, gently if they listen, and free everything. Once only."""
        if self._thread.ident is not None:
            self._stopping = True
            if self._thread.is_alive():
                self.send(wire.encode(wire.Stop()))
                os.eventfd_write(self._wake, 1)
                self._thread.join()
        self._ring.release()
        boards = {descriptor for seat in self._boards if seat is not None for descriptor in seat.descriptors}
        for descriptor in (*boards, self._file, self._wake):
            os.close(descriptor)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        error: BaseException | None
        try:
            self._spawn()
        except BaseException as failed:
            self._end()
            self._spawned.set_exception(failed)
            return
        self._spawned.set_result(None)
        try:
            error = self._listen()
        except Exception as own:  # ranks that are not heard are of no use
            error = own
        self._ring.close()
        self._end()
        if error is not None:
            self._ledger.fail(error)
            if self._ledger.started:
                self._on_death(error)

    def _spawn(self) -> None:
        level = logging.getLogger("interlace").getEffectiveLevel()
        for place, seat, board in zip(self._places, self._ring.seats, self._boards, strict=True):
            meeting = Rendezvous(file=f"/proc/self/fd/{self._file}", interface="lo", board=board)
            shared = () if board is None else board.descriptors
            setup = Setup(self._spec, place, seat, meeting, level)
            self._ranks.append(_Rank(setup, (self._file, *seat.descriptors, *shared)))
        for rank in self._ranks:
            rank.introduce()

    def _end(self) -> None:
        """Kill what still runs; afterwards nothing is left of any of them."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.release()

    def _listen(self) -> BaseException | None:
        """Until all have ended as they were told (None), or one cannot go on (the reason)."""
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        by_socket = {rank.socket.fileno(): rank for rank in self._ranks}
        by_pidfd = {rank.pidfd: rank for rank in self._ranks}
        for descriptor in (*by_socket, *by_pidfd):
            poller.register(descriptor, select.POLLIN)
        watch = StepWatch(self._ledger, self._clock, self._spec.step_timeout_s)
        while by_pidfd:
            ready = poller.poll(1000 * (STOP_TIMEOUT if self._stopping else watch.interval))
            if self._stopping and not ready:
                return None  # they had their time
            for descriptor, _ in ready:
                if descriptor in by_socket:
                    rank = by_socket[descriptor]
                    self._hear(rank)
                    if rank.heard_all:
                        poller.unregister(descriptor)
                elif descriptor in by_pidfd:
                    poller.unregister(descriptor)
                    self._hear_all(by_pidfd.pop(descriptor))
                else:
                    os.eventfd_read(self._wake)
            if self._give_up is not None:
                return self._describe_hang(self._give_up)
            if self._troubles and not self._stopping:
                return self._find_cause()
            if hung := watch.look():
                return self._describe_hang(hung)
        return None

    def _hear(self, rank: _Rank) -> None:
        """Take in what a rank says; if it has ended without a complaint, that is one."""
        for said in rank.hear():
            if isinstance(said, wire.Happened | wire.Logged):
                self._on_event(said)
            else:
                self._note(rank, self._ledger.answer(rank.place.rank, said))
        if rank.heard_all and not self._stopping and not rank.troubled:
            self._note(rank, rank.death())

    def _hear_all(self, rank: _Rank) -> None:
        """The last words of a process that has ended."""
        while not rank.heard_all:
            self._hear(rank)

    def _note(self, rank: _Rank, trouble: Trouble | None) -> None:
        """Of each rank the first trouble counts: what it complained of, or else what it died of."""
        if trouble is not None and not rank.troubled:
            rank.troubled = True
            self._troubles.append(trouble)

    def _find_cause(self) -> BaseException:
        """The error to tell, once nothing likelier to be the cause is to be expected."""
        began = self._clock.now()
        while True:
            cause = blame(self._troubles)
            talking = {rank.socket.fileno(): rank for rank in self._ranks if not rank.heard_all}
            left = began + PATIENCE[cause.sort] - self._clock.now()
            if not talking or left <= 0:
                return self._name(cause)
            poller = select.poll()
            for descriptor in talking:
                poller.register(descriptor, select.POLLIN)
            for descriptor, _ in poller.poll(1000 * left):
                self._hear(talking[descriptor])

    def _name(self, trouble: Trouble) -> BaseException:
        """The error with the rank it comes from, where there is more than one."""
        if len(self._ranks) == 1 or not self._ledger.started or trouble.error.__cause__ is None:
            return trouble.error
        rank = self._ranks[trouble.rank]
        named = InterlaceError(f"{rank.name} failed: {type(trouble.error).__name__}: {trouble.error}")
        named.__cause__ = trouble.error
        return named

    def _describe_hang(self, why: str) -> BaseException:
        """An error that says where every rank is."""
        for rank in self._ranks:
            rank.process.send_signal(STACKS_SIGNAL)
        threading.Event().wait(STACKS_TIMEOUT)
        parts = []
        for rank in self._ranks:
            text = rank.stack_text() or "it did not answer: it is stopped, or was killed\n"
            parts.append(f"{rank.name}, stage {rank.place.stage}:\n{text}")
        error = TimeoutError(why)
        error.__cause__ = RemoteTraceback("\n" + "\n".join(parts))
        return error


class StepWatch:
    """Notices that what is under way does not end. Time in which this process did not run does not count."""

    def __init__(self, ledger: StepLedger, clock: Clock, timeout: float) -> None:
        self._ledger = ledger
        self._clock = clock
        self._timeout = timeout
        # Before the engine's own watchdog, which knows nothing of ranks, ends the whole engine after `timeout`.
        self._limit = max(timeout / 2, timeout * (LOOKS - 1) / LOOKS - STACKS_TIMEOUT)
        self.interval = timeout / LOOKS / 2
        self._progress = -1
        self._stuck = 0.0
        self._last = clock.now()

    def look(self) -> str | None:
        """What is wrong, if it is."""
        now = self._clock.now()
        progress = self._ledger.progress
        if not self._ledger.started or not self._ledger.busy or progress != self._progress:
            self._progress, self._stuck = progress, 0.0
        else:
            self._stuck += min(now - self._last, 2 * self.interval)
        self._last = now
        if self._stuck < self._limit:
            return None
        return (
            f"the ranks have been busy with one step for {self._stuck:.1f} s (engine.step_timeout_s = "
            f"{self._timeout:g} allows little more)"
        )
