"""Whole engines in a cluster, without one: what is asked for, what they get of a node, what carries messages."""

from __future__ import annotations

import socket
import threading

import msgspec
import pytest

from interlace.clock import VirtualClock
from interlace.errors import ConfigError
from interlace.plugin_manager import PluginManager
from interlace.plugins.executors.cluster import engine_link
from interlace.plugins.executors.cluster.carrier import Outbox, TcpConnection, ask_time, tell_time
from interlace.plugins.executors.cluster.engine_link import ray_host
from interlace.plugins.executors.cluster.options import RayOptions
from interlace.plugins.executors.processes.channel import MessageReader
from interlace.spec import CacheSpec
from interlace.testing import ExecutorConformance

WHOLE = {"address": "auto", "engine_core": "cluster"}


@pytest.fixture
def spec(tmp_path):
    """`spec(option=…)`, with 600 bytes or 0.6 of the memory, and 12 threads."""

    def make(**options):
        suite = type("Suite", (ExecutorConformance,), {"executor": "ray", "options": {**WHOLE, **options}})
        suite.setup_class()
        cache = CacheSpec(memory_bytes=600, memory_share=0.6)
        return msgspec.structs.replace(suite().spec(tmp_path), cache=cache, threads=12, device="cpu")

    return make


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# ── options ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_who_asks_for_it_has_a_host():
    component = PluginManager().registry("executors").get("ray").component({"address": "auto"})
    assert component.make_host() is None
    host = msgspec.structs.replace(
        component, options={"address": "10.0.0.1:6379", "engine_core": "cluster"}
    ).make_host()
    assert host.describe() == "on nodes of the Ray cluster 10.0.0.1:6379"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"address": ""}, r"engine_core = 'cluster' needs the address of a cluster: HOST:PORT .*, or 'auto'"),
        ({"address": "ray://head:10001"}, "a Ray Client address does not do"),
        ({"tensor_parallel": 2, "placement": "spread"}, r"placement = 'spread' spreads the ranks of an engine"),
        ({"pipeline_parallel": 2, "placement": "strict_spread"}, "are processes of one node"),
    ],
)
def test_options_that_cannot_be(spec, options, text):
    with pytest.raises(ConfigError, match=text):
        ray_host({**WHOLE, **options}).link(spec())


def test_options_that_only_whole_engines_have(spec):
    assert ray_host({**WHOLE, "tensor_parallel": 2, "all_reduce": "shared_memory"}).link(spec()).pid is None


def test_ray_that_is_not_installed(spec, monkeypatch):
    monkeypatch.setattr(engine_link, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'interlace\[ray\]'"):
        ray_host(WHOLE).link(spec())


def test_what_ray_is_asked_for_is_for_all_ranks(spec):
    options = RayOptions(**WHOLE, tensor_parallel=2, pipeline_parallel=2, threads_per_rank=3)
    assert options.engine_resources(spec()) == {"CPU": 12.0}
    on_gpus = msgspec.structs.replace(spec(), device="cuda")
    assert RayOptions(**WHOLE, tensor_parallel=2).engine_resources(on_gpus) == {"CPU": 2.0, "GPU": 2.0}


# ── what an engine gets of its node ───────────────────────────────────────────────────────────────────────────


def test_one_rank_is_the_engine_itself(spec):
    given = spec()
    settled = RayOptions(**WHOLE).settle(given, sharers=3)
    assert settled.executor.name == "uniprocess" and settled.executor.host is None
    assert len(settled.executor.build().places(settled)) == 1
    assert (settled.threads, settled.cache.memory_bytes) == (4, 200)
    assert settled.cache.memory_share == pytest.approx(0.2)
    assert settled.executor.package == given.executor.package


def test_several_ranks_are_processes(spec):
    options = RayOptions(**WHOLE, tensor_parallel=2, pipeline_parallel=2, threads_per_rank=3, cores=["auto"])
    settled = options.settle(spec(), sharers=2)
    executor = settled.executor.build()
    assert settled.executor.name == "multiprocess"
    assert (executor.options.tensor_parallel, executor.options.pipeline_parallel) == (2, 2)
    assert executor.options.cores == ["auto"] and settled.threads == 12, "as many as Ray was asked for"


def test_on_gpus_each_has_its_own(spec):
    options = RayOptions(**WHOLE, tensor_parallel=2, devices=["cuda:4", "cuda:7"])
    settled = options.settle(msgspec.structs.replace(spec(), device="cuda"), sharers=2)
    places = settled.executor.build().places(settled)
    assert [place.device for place in places] == ["cuda:0", "cuda:1"], "Ray hides the others"
    assert (settled.cache.memory_bytes, settled.cache.memory_share) == (600, 0.6)


# ── what carries messages ─────────────────────────────────────────────────────────────────────────────────────


def read(connection, count):
    reader, messages = MessageReader(connection), []
    while len(messages) < count:
        messages += reader.read()
    return messages


def test_nobody_waits_for_a_reader_that_sleeps(pair):
    ours, theirs = pair
    outbox = Outbox(ours)
    sent = [bytes([number]) * (1 << 18) for number in range(40)]
    for message in sent:
        outbox.put(message)  # 10 MiB, and nobody reads
    assert read(theirs, 40) == sent, "in order"
    outbox.flush(10.0)
    outbox.put(b"more")
    assert read(theirs, 1) == [b"more"]
    ours.shutdown(socket.SHUT_RDWR)
    outbox.close()


def test_a_broken_connection_is_told_and_holds_nobody_up(pair):
    ours, theirs = pair
    outbox = Outbox(ours)
    for _ in range(40):
        outbox.put(bytes(1 << 18))
    theirs.close()
    outbox.flush(10.0)
    with pytest.raises(ConnectionError):
        outbox.put(b"late")
    outbox.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "interlace-outbox"]


def test_the_last_word_is_heard_before_the_end(pair):
    ours, theirs = pair
    connection = TcpConnection(ours, 0.0)
    for _ in range(20):
        connection.send(bytes(1 << 18))
    connection.send(b"the last word")
    closing = threading.Thread(target=connection.close)
    closing.start()
    assert read(theirs, 21)[-1] == b"the last word"
    assert theirs.recv(1) == b"", "nothing more comes"
    assert closing.is_alive(), "the front closes first"
    theirs.close()
    closing.join(10.0)
    assert not closing.is_alive()
    connection.send(b"nobody hears this")
    with pytest.raises(EOFError):
        connection.receive()


def test_what_comes_in_one_piece_is_received_one_by_one(pair):
    ours, theirs = pair
    outbox = Outbox(theirs)
    for message in (b"a", b"", b"c"):
        outbox.put(message)
    connection = TcpConnection(ours, 0.0)
    assert [connection.receive() for _ in range(3)] == [b"a", b"", b"c"]


def test_the_quickest_answer_about_the_time_counts(pair):
    """The asker's clock moves while it waits, by another amount each time; the other one is 1000 s ahead."""
    ours, theirs = pair
    here = VirtualClock(50.0)

    class Ahead:
        delays = iter([8.0, 2.0, 0.5, 4.0, 16.0])

        def now(self):
            delay = next(self.delays)
            here.advance(0.75 * delay)
            moment = here.now() + 1000.0
            here.advance(0.25 * delay)
            return moment

    answering = threading.Thread(target=tell_time, args=(theirs, Ahead()))
    answering.start()
    offset = ask_time(ours, here)
    answering.join(10.0)
    assert offset == pytest.approx(1000.0 + 0.25 * 0.5), "wrong by less than half of the quickest round"


def test_an_end_while_the_time_is_asked(pair):
    ours, theirs = pair
    theirs.shutdown(socket.SHUT_RDWR)
    with pytest.raises((EOFError, OSError)):
        ask_time(ours, VirtualClock())
    with pytest.raises((EOFError, OSError)):
        tell_time(ours, VirtualClock())
