"""An engine process that is killed, one that hangs, and too many requests: clients are told, and metrics count it."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.slow

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 7000, "ignore_eos": True, "stream": True}


def read(client, name, labels=""):
    """One number of `/metrics`."""
    return float(re.search(rf"^{name}\{{[^}}]*{labels}[^}}]*\}} (\S+)$", client.get("/metrics").text, re.MULTILINE)[1])


def wait_until_well(server, client):
    for _ in range(1200):
        if client.get("/ready").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError(server.log)


def break_engine(server, client, number):
    """Stream, send `number` to the engine process, and return (the last event, what health said of it)."""
    with client.stream("POST", "/v1/completions", json=ENDLESS) as response:
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        [engine] = server.engines
        engine.send_signal(number)
        last = list(lines)[-1]
    health = client.get("/health")
    engine.wait(60)
    return json.loads(last.removeprefix("data: ")), health


def test_a_killed_and_a_hung_engine_are_replaced(start, tiny_settings):
    server = start(tiny_settings | {"engine.step_timeout_s": 4, "server.metrics_compat": "vllm"})
    with server.client() as client:
        assert (read(client, "interlace:engine_restarts_total"), read(client, "interlace:engine_up")) == (0, 1)
        generated = 0
        faults = ((signal.SIGKILL, "signal 9"), (signal.SIGSTOP, "it answered nothing for 4 s"))
        for count, (number, cause) in enumerate(faults, start=1):
            last, health = break_engine(server, client, number)
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine_restarting"), last
            assert health.status_code == 503 or health.json()["restarts"] == count, health.text
            wait_until_well(server, client)
            assert client.get("/health").json()["restarts"] == count
            assert read(client, "interlace:engine_restarts_total") == count
            assert read(client, "interlace:engine_up") == 1
            assert cause in server.log, server.log
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "ignore_eos": True})
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 2)
            total = read(client, "vllm:generation_tokens_total")
            assert total > generated, "counters go on across engine processes"
            generated = total
        assert read(client, "interlace:request_errors_total", 'code="engine_dead"') == 2


def test_too_many_requests_are_refused_at_once_and_counted(start, tiny_settings):
    server = start(
        tiny_settings | {"scheduler.max_num_seqs": 1, "server.max_waiting": 2, "server.metrics_compat": "vllm"}
    )
    body = ENDLESS | {"max_tokens": 400, "stream": False}
    with server.client() as client, ThreadPoolExecutor(12) as pool:
        assert read(client, "vllm:admission_rejections_total", 'reason="max_num_queued_reqs"') == 0
        answers = list(pool.map(lambda _: client.post("/v1/completions", json=body), range(12)))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert all(answer.status_code == 200 for answer in answers if answer not in refused)
        assert len(refused) >= 1
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "overloaded"
        for prefix in ("interlace", "vllm"):
            name = f"{prefix}:admission_rejections_total"
            assert read(client, name, 'reason="max_num_queued_reqs"') == len(refused)
        assert client.get("/health").status_code == 200
