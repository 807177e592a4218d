"""Which rank is named when several end together, whatever order the news arrive in."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
import threading
import time
from itertools import permutations

import msgspec
import pytest

from interlace.plugins.executors.multiprocess import MultiprocessExecutor
from interlace.plugins.executors.processes import processes
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.blame import PATIENCE, Sort, Trouble, blame
from interlace.plugins.executors.ranks.ledger import StepLedger
from interlace.remote_error import RemoteError
from interlace.testing.executor_driver import Driver
from interlace.testing.executor_suite import GREEDY, ExecutorConformance


def trouble(rank, sort):
    return Trouble(rank, RuntimeError(f"{sort.name} {rank}"), sort)


@pytest.mark.parametrize(
    ("cause", "others"),
    [
        (Sort.KILLED, [Sort.MISSED_A_PEER, Sort.MISSED_A_PEER, Sort.MISSED_A_PEER]),
        (Sort.KILLED, [Sort.ENDED, Sort.MISSED_A_PEER]),  # a library aborts, because a peer is gone
        (Sort.KILLED, [Sort.FAILED, Sort.ENDED]),  # an exchange that is not recognised as one
        (Sort.FAILED, [Sort.MISSED_A_PEER, Sort.ENDED]),
        (Sort.ENDED, [Sort.MISSED_A_PEER, Sort.MISSED_A_PEER]),
    ],
)
def test_the_cause_is_found_in_every_order_of_arrival(cause, others):
    for found in permutations([trouble(7, cause), *(trouble(rank, sort) for rank, sort in enumerate(others))]):
        assert blame(found).rank == 7


@pytest.mark.parametrize("sort", list(Sort))
def test_among_equals_the_first_one_noticed_counts(sort):
    for found in permutations([trouble(rank, sort) for rank in range(3)]):
        assert blame(found) is found[0]


def test_nobody_waits_once_the_cause_is_certain():
    assert PATIENCE[Sort.KILLED] == 0.0
    assert sorted(PATIENCE) == list(Sort) and list(PATIENCE.values()) == sorted(PATIENCE.values())


def test_what_ranks_say_is_sorted_by_whether_they_miss_a_peer():
    ledger, error = StepLedger(2), RemoteError.of(ValueError("no"))
    for said in (wire.Failed(error), wire.StepFailed(0, error)):
        assert ledger.answer(1, said).sort is Sort.FAILED
    for said in (wire.Failed(error, True), wire.StepFailed(0, error, True)):
        assert ledger.answer(1, said).sort is Sort.MISSED_A_PEER


# ── real processes ────────────────────────────────────────────────────────────────────────────────────────────


class Suite(ExecutorConformance):
    """For its means; its tests are elsewhere."""

    __test__ = False
    executor = "multiprocess"


class HeldWatch(processes.StepWatch):
    """The thread that hears ranks stops here while `hold` is set: what they do meanwhile is there all at once."""

    hold, held, go_on = threading.Event(), threading.Event(), threading.Event()

    def look(self):
        if self.hold.is_set():
            self.held.set()
            assert self.go_on.wait(60)
        return super().look()


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """Two tensor ranks that exchange by gloo, which tells the survivor of a death at once."""
    monkeypatch.setattr(processes, "StepWatch", HeldWatch)
    executor = MultiprocessExecutor(MultiprocessExecutor.Options(tensor_parallel=2, all_reduce="gloo"))
    executor.spec = msgspec.structs.replace(Suite().spec(tmp_path), step_timeout_s=8.0)  # it looks twice a second
    yield executor
    HeldWatch.hold.clear()
    HeldWatch.go_on.set()
    executor.shutdown()
    for event in (HeldWatch.hold, HeldWatch.held, HeldWatch.go_on):
        event.clear()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def unread(rank):
    """Bytes it has said that nobody has read."""
    return struct.unpack("i", fcntl.ioctl(rank.socket, termios.FIONREAD, b"\0" * 4))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sign"), [(0, signal.SIGKILL), (1, signal.SIGABRT)])
def test_a_death_and_the_complaint_of_the_survivor_arrive_together(executor, victim, sign):
    """The executor looks again when both are there; which descriptor it sees first depends on the victim."""
    driver = Driver(executor, executor.spec, 60.0)
    ranks, pid = executor._processes._ranks, executor.pids[victim]
    os.kill(pid, signal.SIGSTOP)
    driver.add([1, 2, 3], **GREEDY)
    (future,) = driver.submit_all()
    HeldWatch.hold.set()
    assert HeldWatch.held.wait(60)
    os.kill(pid, sign)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: unread(ranks[1 - victim]))
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    HeldWatch.hold.clear()
    HeldWatch.go_on.set()
    error = future.exception(60)
    assert f"rank {victim} (pid {pid}) was killed by signal {int(sign)} ({sign.name})" in str(error)
