"""The same for ranks on a cluster: connections that close say little, and the launcher is asked what is behind it.

Ranks and launcher are sockets that the test speaks through; the rest is real.
"""

from __future__ import annotations

import socket
from itertools import permutations

import pytest

from interlace.clock import MonotonicClock
from interlace.plugins.executors.cluster import ranks as module
from interlace.plugins.executors.cluster.messages import FromLauncher, Gone, Launch, Placed, Seat
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.processes.channel import frame
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.ledger import StepLedger
from interlace.plugins.executors.ranks.meeting import PeerLostError
from interlace.remote_error import RemoteError
from interlace.testing.executor_suite import ExecutorConformance

KILLED = "its worker process has died"
MISSED = wire.encode(wire.Failed(RemoteError.of(PeerLostError("Connection reset by peer")), True))


class Launcher:
    """Places two ranks, and knows what became of rank 1 only."""

    pid, folder = 0, ""

    def __init__(self, *, own_cluster):
        self._ours, self._theirs = socket.socketpair()
        self._answers: list[FromLauncher] = []
        self.asked = []

    def send(self, message):
        if isinstance(message, Launch):
            seats = [Seat(host="node", port=rank, key=b"", pid=10 + rank, node_id="", store_port=0) for rank in (0, 1)]
            self._say(Placed(seats))
        else:
            self.asked.append(message.rank)
            self._say(Gone(message.rank, KILLED if message.rank == 1 else ""))

    def _say(self, answer):
        self._answers.append(answer)
        self._theirs.sendall(b".")

    def read(self):
        count = len(self._ours.recv(100))
        said, self._answers = self._answers[:count], self._answers[count:]
        return said

    def fileno(self):
        return self._ours.fileno()

    def stop(self):
        self._theirs.close()

    def release(self):
        self._ours.close()


class Cluster:
    """The executor's side of two ranks, and the ends that the ranks would hold."""

    def __init__(self, spec, ends):
        self.ends = ends
        self.ledger = StepLedger(2)
        options = RayOptions(tensor_parallel=2)
        self.ranks = module.ClusterRanks(
            spec, options, self.ledger, lambda event: None, lambda error: None, MonotonicClock()
        )

    def news(self, what):
        """`says 0`: rank 0 misses a peer; `ends 1`: its connection closes."""
        kind, rank = what.split()
        if kind == "says":
            self.ends[int(rank)].sendall(frame(MISSED))
        else:
            self.ends[int(rank)].close()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    suite = type("Suite", (ExecutorConformance,), {"executor": "ray"})
    ends = {}

    def connect(seat, timeout):
        ours, ends[seat.port] = socket.socketpair()
        return ours

    monkeypatch.setattr(module, "LauncherProcess", Launcher)
    monkeypatch.setattr(module, "connect", connect)
    made = Cluster(suite().spec(tmp_path), ends)
    yield made
    made.ranks.stop()
    for end in ends.values():
        end.close()


def in_order(news):
    """What a rank says, it says before it ends."""
    return "says 0" not in news or "ends 0" not in news or news.index("says 0") < news.index("ends 0")


ORDERS = [order for order in permutations(["says 0", "ends 0", "ends 1"]) if in_order(order)]


@pytest.mark.parametrize("order", [("says 0", "ends 1"), ("ends 1", "says 0"), *ORDERS], ids=", ".join)
def test_the_rank_that_died_is_named_and_not_the_one_that_misses_it(cluster, order):
    question, _ = cluster.ledger.ask(wire.Prepare())
    cluster.ranks.start()
    for what in order:
        cluster.news(what)
    error = question.exception(60)
    assert str(error) == f"rank 1 (pid 11 on node node) is gone: {KILLED}"


def test_who_complained_keeps_its_words_where_nobody_knows_more(cluster):
    question, _ = cluster.ledger.ask(wire.Prepare())
    cluster.ranks.start()
    for what in ("says 0", "ends 0"):
        cluster.news(what)
    assert "Connection reset by peer (said by rank 0" in str(question.exception(60))
    assert cluster.ranks._launcher.asked == [0]


def test_a_rank_that_ended_by_itself_without_a_word(cluster):
    question, _ = cluster.ledger.ask(wire.Prepare())
    cluster.ranks.start()
    cluster.news("ends 0")
    assert str(question.exception(60)) == "rank 0 (pid 10 on node node) is gone: it ended by itself"
