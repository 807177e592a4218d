"""`interlace serve` as an operator meets it: the process, its start, its signals and its end."""

import json
import re
import signal
import ssl
import threading
import time

import httpx
import pytest

KEYS = ("sk-the-first-key", "sk-the-second-key")
ENDLESS = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 7000, "ignore_eos": True, "stream": True}


class Stream:
    """An answer that is read in a thread of its own."""

    def __init__(self, server, body=ENDLESS, key=None):
        self.chunks, self.error, self.status = 0, None, None
        self.text = ""
        self._server, self._body, self._key = server, body, key
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            with (
                self._server.client(self._key) as client,
                client.stream("POST", "/v1/completions", json=self._body) as response,
            ):
                self.status = response.status_code
                for line in response.iter_lines():
                    self.text += line + "\n"
                    self.chunks += line.startswith("data: ")
                    if self._left.is_set():
                        return
        except httpx.HTTPError as error:
            self.error = error

    def leave(self):
        """Close the connection in the middle."""
        self._left.set()
        self.join()

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()


def send_request(raw, body):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)


@pytest.fixture
def tiny(tiny_settings):
    return tiny_settings | {"server.served_model_names": "tiny,other-name"}


# ── a server with keys ──────────────────────────────────────────────────────────────────────────────────────────


def test_it_says_what_it_is_and_lets_in_only_keys(start, tmp_path, tiny):
    keys = tmp_path / "keys"
    keys.write_text("\n".join(KEYS))
    server = start(tiny | {"server.api_keys_file": keys})
    for word in ("scheduler: fcfs", "attention: ", "kernels: ", "serving tiny (also as other-name)", "2 API keys"):
        assert word in server.log
    with server.client() as client:
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/v1/models").status_code == 401
    with server.client(KEYS[1]) as client:
        assert client.get("/health").json()["num_running"] == 0
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health/generate"} <= set(paths)
        check_every_route(server, paths)
        check_names(client)
        check_echo(client)
        for path in ("/health/generate", "/load", "/docs"):
            assert client.get(path).status_code == 200, path
    assert not any(key in server.log for key in KEYS)
    assert "Once upon" not in server.log
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "stopped" in server.log


def check_every_route(server, paths):
    """Each is closed without a key and with a wrong one, whether it exists or not."""
    closed = [(method, path) for path, operations in paths.items() for method in operations]
    closed = [(method, path) for method, path in closed if path not in ("/health", "/ready")]
    closed += [("get", path) for path in ("/docs", "/openapi.json", "/metrics", "/live", "/no/such/route")]
    with server.client() as nobody, server.client("sk-not-one-of-them") as stranger:
        for method, path in closed:
            url = path.replace("{", "").replace("}", "")
            for client, code in ((nobody, "missing_api_key"), (stranger, "invalid_api_key")):
                response = client.request(method, url)
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == code


def check_names(client):
    body = {"prompt": "Once upon", "max_tokens": 2}
    for name in ("tiny", "other-name"):
        response = client.post("/v1/completions", json=body | {"model": name})
        assert (response.status_code, response.json()["model"]) == (200, "tiny")
    assert client.post("/v1/completions", json=body | {"model": "unknown"}).status_code == 404
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "other-name"]


def check_echo(client):
    assert client.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/nowhere", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


# ── abuse and accidents, on one server ──────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_client_that_leaves_takes_its_work_with_it(start, tiny):
    server = start(tiny)
    for body in (ENDLESS, ENDLESS | {"stream": False}):
        if body["stream"]:
            stream = Stream(server, body)
            server.wait_running(1)
            stream.leave()
        else:
            with server.connect() as raw:
                send_request(raw, json.dumps(body).encode())
                server.wait_running(1)
        server.wait_running(0)
    with server.client() as client:
        health = client.get("/health").json()
        assert (health["status"], health["num_running"]) == ("ok", 0)


@pytest.mark.slow
def test_large_slow_and_broken_requests_hurt_nobody_else(start, tiny):
    server = start(tiny | {"server.client_timeout_s": 2.0})
    with server.client() as client:
        for content in (b"x" * 10_000_000, (b"x" * 100_000 for _ in range(100))):  # declared and chunked
            response = client.post("/v1/completions", content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        slow = [server.connect() for _ in range(50)]
        for connection in slow[:25]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow")
        for connection in slow[25:]:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert client.get("/health/generate").status_code == 200  # while they dawdle
        for connection in slow:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
            connection.close()
        with server.connect() as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\n")
            assert refused_for_size(raw)
        with server.connect() as raw:
            raw.sendall(b"\x16\x03\x01 not HTTP at all\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
        assert client.get("/health/generate").status_code == 200


def refused_for_size(raw):
    """Headers without end: until the server has had enough."""
    try:
        for i in range(1000):
            raw.sendall(b"X-%d: " % i + b"x" * 1000 + b"\r\n")
    except OSError:
        pass
    try:
        return b"HTTP/1.1 431 " in raw.recv(100)
    except ConnectionError:
        return True  # hung up on, with what was still being sent


@pytest.mark.slow
def test_a_slow_reader_is_waited_for_alone(start, tiny):
    server = start(tiny)
    with server.connect(receive_buffer=4096) as raw:
        send_request(raw, json.dumps(ENDLESS | {"max_tokens": 1000, "logprobs": 5}).encode())
        server.wait_running(1)
        memory = server.memory
        server.wait_running(0)  # the engine is done although nothing was read
        with server.client() as client:
            for _ in range(5):
                response = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 4})
                assert response.status_code == 200
        assert server.memory - memory < 64 << 20
        received = b""
        while b"[DONE]" not in received[-100:]:
            piece = raw.recv(65536)
            assert piece, "the stream ended early"
            received += piece
    tokens = sum(len(json.loads(data)["choices"][0]["logprobs"]["tokens"]) for data in events(received))
    assert tokens == 1000  # fewer, larger pieces, and nothing lost


def events(received):
    # Chunked encoding puts lines of its own between events; none of them begins like one.
    body = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", received.partition(b"\r\n\r\n")[2])
    found = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
    return [data for data in found if json.loads(data)["choices"][0].get("logprobs")]


# ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_sigterm_lets_those_under_way_finish(start, tiny):
    server = start(tiny | {"server.drain_timeout_s": 120})
    body = ENDLESS | {"max_tokens": 3000}  # still under way when the questions below have been answered
    streams = [Stream(server, body) for _ in range(4)]
    server.wait_running(4)
    with server.client() as client:
        client.get("/health")  # so that the connection stands
        server.signal(signal.SIGTERM)
        server.wait_for_log("new requests are refused")
        response = client.post("/v1/completions", json=body)
        assert (response.status_code, response.headers["retry-after"]) == (503, "120")
        assert response.json()["error"]["code"] == "shutting_down"
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
    assert server.wait(120) == 0
    for stream in streams:
        stream.join()
        assert stream.error is None
        assert stream.text.rstrip().endswith("data: [DONE]")
    assert "cut off" not in server.log.partition("new requests are refused")[2]


@pytest.mark.slow
def test_the_drain_has_a_limit(start, tiny):
    server = start(tiny | {"server.drain_timeout_s": 0.5})
    streams = [Stream(server) for _ in range(2)]
    server.wait_running(2)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "2 requests are cut off" in server.log
    for stream in streams:
        stream.join()
        assert "[DONE]" not in stream.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(start, tiny, number):
    server = start(tiny | {"server.drain_timeout_s": 600})
    stream = Stream(server)
    server.wait_running(1)
    engine = server.engines
    assert engine
    server.signal(number)
    server.wait_for_log("1 under way")
    server.signal(number)
    assert server.wait() == 128 + number
    stream.join()
    for process in engine:
        process.wait(60)


@pytest.mark.slow
def test_told_to_stop_while_starting(start, tiny):
    server = start(tiny, ready=False)
    for _ in range(1000):
        if server.engines:
            break
        time.sleep(0.02)
    server.signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_an_engine_that_is_dead_for_good_ends_the_server(start, tiny):
    server = start(tiny | {"engine.max_restarts": 0})
    stream = Stream(server)
    server.wait_running(1)
    [engine] = server.engines
    engine.kill()
    assert server.wait() == 1
    stream.join()
    assert '"error"' in stream.text
    assert "signal 9" in server.log
    assert "is not started again; the server ends" in server.log


# ── ways in and out ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_tls(start, tiny, tmp_path, make_certificate):
    certificate, key = make_certificate(tmp_path)
    settings = {"server.host": "localhost", "server.tls_certificate": certificate, "server.tls_key": key}
    server = start(tiny | settings)
    assert server.url.startswith("https://localhost:")
    trusting = ssl.create_default_context(cafile=str(certificate))
    with server.client(verify=trusting) as client:
        response = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2})
        assert response.status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE"), server.client() as client:
        client.get("/health")
    with pytest.raises(httpx.HTTPError), httpx.Client() as client:
        client.get(server.url.replace("https", "http") + "/health")


@pytest.mark.slow
def test_a_unix_socket_and_a_full_disk(start, tiny, tmp_path):
    path = tmp_path / "socket"
    server = start(tiny | {"server.unix_socket": path, "server.log_file": "/dev/full"})
    with server.client() as client:
        for _ in range(3):
            response = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2})
            assert response.status_code == 200
    server.signal(signal.SIGKILL)
    server.wait()
    assert path.exists()
    assert server.log.count("No space left on device") == 1
    server = start(tiny | {"server.unix_socket": path})
    with server.client() as client:
        assert client.get("/health").json()["status"] == "ok"
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert not path.exists()


@pytest.mark.slow
def test_every_line_of_a_json_log_is_json(start, tiny):
    server = start(tiny | {"server.log_format": "json"})
    with server.client() as client:
        client.post("/v1/completions", json={"model": "tiny", "prompt": "the secret", "max_tokens": 2})
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    entries = [json.loads(line) for line in server.log.splitlines()]
    [access] = [entry for entry in entries if entry["logger"] == "interlace.access"]
    assert (access["method"], access["path"], access["status"]) == ("POST", "/v1/completions", 200)
    assert "the secret" not in server.log
