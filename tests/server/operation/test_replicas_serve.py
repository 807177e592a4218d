"""A server with replicas: one of them is killed while clients stream, and only its own clients notice."""

from __future__ import annotations

import json
import re
import signal
import threading
import time

import httpx
import pytest

pytestmark = pytest.mark.slow

LONG = {"max_tokens": 1500, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
SHORT = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}


class Stream(threading.Thread):
    """A client with a connection of its own that reads a long answer; `events` are the chunks it got."""

    def __init__(self, server, number):
        super().__init__(daemon=True)
        self.server, self.body = server, LONG | {"prompt": f"{number} times upon a time"}
        self.started = threading.Event()
        self.events = []
        self.start()

    def run(self):
        with self.server.client() as client, client.stream("POST", "/v1/completions", json=self.body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.started.set()

    @property
    def outcome(self):
        self.join(120)
        assert not self.is_alive()
        last = self.events[-1]
        return last["error"]["code"] if "error" in last else last["usage"]["completion_tokens"]


def series(client, name):
    """`engine` label → value."""
    text = client.get("/metrics").text
    return {m[1]: float(m[2]) for m in re.finditer(rf'^{name}\{{[^}}]*engine="(\d)"[^}}]*\}} (\S+)$', text, re.M)}


def until(condition, server):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)


def test_a_killed_replica_takes_only_its_own_streams(start, tiny_settings):
    server = start({"engine.replicas": 2, "router.use": "round_robin"})
    for words in ("replicas: 2 engines, 1 thread each", "router round_robin (router.use, command line)"):
        assert words in server.log
    with server.client() as client:
        streams = [Stream(server, number) for number in range(6)]
        for stream in streams:
            assert stream.started.wait(60)
        assert client.get("/live").json()["engine"]["num_running"] == 6
        victim = server.engines[1]
        victim.send_signal(signal.SIGKILL)
        victim.wait(60)
        until(lambda: 0.0 in series(client, "interlace:engine_up").values(), server)
        (lost,) = [engine for engine, up in series(client, "interlace:engine_up").items() if not up]
        statuses = [client.post("/v1/completions", json=SHORT).status_code for _ in range(10)]
        assert statuses == [200] * 10, "new requests go to the one that lives"
        health = client.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        assert f"replica {lost}: " in health.json()["reason"] and "signal 9" in health.json()["last_cause"]
        assert client.get("/ready").status_code == 200
        assert sorted(str(stream.outcome) for stream in streams) == ["1500"] * 3 + ["engine_restarting"] * 3
        for stream in streams:
            if stream.outcome == "engine_restarting":
                assert f"replica {lost} of 2" in stream.events[-1]["error"]["message"]
        until(lambda: client.get("/health").json()["status"] == "ok", server)
        before = series(client, "interlace:steps_total")
        for _ in range(4):
            assert client.post("/v1/completions", json=SHORT).status_code == 200
        after = series(client, "interlace:steps_total")
        assert after[lost] > before[lost], "it gets work again"
        assert series(client, "interlace:engine_restarts_total") == {"0": 1.0 * (lost == "0"), "1": 1.0 * (lost == "1")}
        assert len(client.get("/live").json()["engine"]["replicas"]) == 2


def test_controls_reach_all_and_the_end_leaves_nothing(start):
    server = start({"engine.replicas": 3})
    engines = server.engines
    assert len(engines) == 3
    with server.client() as client:
        assert client.get("/health").json()["status"] == "ok"
        live = client.get("/live").json()["engine"]
        assert [replica["works"] for replica in live["replicas"]] == [True] * 3
        assert live["plugins"]["routers"] == ["prefix_affinity"]
        assert sum(length for _, length in live["blocks"]) * live["blocks_stride"] >= live["num_blocks"]
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not any(engine.is_running() for engine in engines)


def test_when_all_die_at_once_clients_are_told_to_come_back(start):
    server = start({"engine.replicas": 2})
    with server.client() as client:
        for engine in server.engines:
            engine.send_signal(signal.SIGKILL)
        until(lambda: client.get("/ready").status_code == 503, server)
        answer = client.post("/v1/completions", json=SHORT)
        if answer.status_code != 200:  # otherwise one is back already
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_restarting")
            assert int(answer.headers["retry-after"]) >= 1
        until(lambda: client.get("/health").json()["status"] == "ok", server)
        assert client.post("/v1/completions", json=SHORT).status_code == 200
        assert client.get("/health").json()["restarts"] == 2


def test_replicas_that_cannot_start_end_with_the_true_cause(start):
    server = start({"engine.replicas": 2, "cache.memory": "1TB"}, ready=False)
    assert server.wait() == 2
    assert "cache.memory asks for" in server.log


def test_a_front_that_is_killed_leaves_no_replica(start):
    server = start({"engine.replicas": 2})
    engines = server.engines
    server.signal(signal.SIGKILL)
    server.wait()
    until(lambda: not any(engine.is_running() for engine in engines), server)
    with pytest.raises(httpx.ConnectError):
        server.client().get("/health")
