"""What clients are told when the engine fails, and what the engine is told when clients leave: a scripted engine."""

import json
import logging
import threading

import httpx
import pytest

from interlace.errors import CapacityError, EngineRestartingError, InterlaceError, OverloadedError, RequestFailedError
from interlace.server.errors import describe
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer

BODY = {"prompt": "hello", "max_tokens": 100}


@pytest.fixture
def engine():
    script = byte_tokenizer().encode("abcdef" * 10)
    return ScriptedClient(lambda request: script, auto=False)


@pytest.fixture
def http(serving_engine, engine):
    with serving_engine(engine) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def settle(condition):
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came to that")


def behind(engine, act):
    """Do `act` once a request has reached the engine."""

    def wait_and_act():
        settle(lambda: engine.running)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "type"),
    [
        ("kv_capacity", 400, "invalid_request_error"),
        ("deadline", 504, "timeout_error"),
        ("rejected", 503, "overloaded_error"),
        ("step_failed", 500, "server_error"),
    ],
)
def test_failing_before_the_first_token_is_a_status(http, engine, stream, code, status, type):
    def fail():
        engine.fail(engine.running[0], "because", code)
        engine.step()

    thread = behind(engine, fail)
    response = http.post("/v1/completions", json=BODY | {"stream": stream})
    thread.join()
    assert response.status_code == status
    assert response.json()["error"]["message"] == "because" and response.json()["error"]["type"] == type
    assert ("retry-after" in response.headers) == (status == 503)


def test_failing_later_is_the_last_event(http, engine):
    thread = behind(engine, engine.step)
    with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "a"
        thread.join()
        engine.fail(engine.running[0], "because", "step_failed")
        engine.step()
        rest = [line for line in lines if line]
    assert response.status_code == 200
    assert json.loads(rest[-1].removeprefix("data: "))["error"] == {
        "message": "because",
        "type": "server_error",
        "param": None,
        "code": "step_failed",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_said_at_once(http, engine, stream):
    thread = behind(engine, lambda: engine.die(RuntimeError("boom")))
    response = http.post("/v1/completions", json=BODY | {"stream": stream})
    thread.join()
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"
    assert "boom" in response.json()["error"]["message"]
    again = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert again.status_code == 503 and again.json()["error"]["code"] == "engine_dead"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted(http, engine, stream):
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=BODY | {"stream": stream, "n": 2}, timeout=httpx.Timeout(30, read=0.5))
    settle(lambda: len(engine.aborted) == 2)
    assert not engine.running


def test_an_unexpected_error_stays_vague(http, engine, monkeypatch):
    def refuse(requests):
        raise KeyError("secret")

    monkeypatch.setattr(engine, "add", refuse)
    response = http.post("/v1/completions", json=BODY)
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"


def test_a_request_leaves_a_line_without_its_prompt(http, engine, caplog):
    caplog.set_level(logging.INFO, "interlace.server")

    def finish():
        for _ in range(3):
            engine.step()

    thread = behind(engine, finish)
    answer = http.post("/v1/completions", json=BODY | {"max_tokens": 3, "prompt": "my secret"}).json()
    thread.join()
    settle(lambda: any(record.name == "interlace.server" for record in caplog.records))
    [record] = [record for record in caplog.records if record.name == "interlace.server"]
    assert record.fields["request_id"] == answer["id"] and record.fields["finish_reason"] == "length"
    assert record.fields["prompt_tokens"] == 9 and record.fields["completion_tokens"] == 3
    assert "secret" not in caplog.text


def test_settings_and_callers_reach_the_engine(http, engine):
    def finish():
        for _ in range(3):
            engine.step()

    thread = behind(engine, finish)
    body = BODY | {"max_tokens": 3, "priority": 5, "cache_salt": "s", "user": "ada", "seed": 4}
    http.post("/v1/completions", json=body).raise_for_status()
    thread.join()
    [request] = engine.added
    assert request.priority == 5 and request.cache_salt == "s" and request.labels == {"user": "ada"}
    assert request.seed == 4 and request.deadline is not None


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_fit_are_as_many_as_fit(http, engine, key):
    thread = behind(engine, lambda: engine.die(RuntimeError("enough")))
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], key: 90_000})
    thread.join()
    [request] = engine.added
    assert request.params.max_tokens == 128 - len(request.prompt_token_ids), "max_model_len of the fake is 128"


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (OverloadedError("full"), 503, "1"),
        (EngineRestartingError("again", 2.4), 503, "3"),
        (RequestFailedError("x", "rejected"), 503, "1"),
        (CapacityError("x"), 500, None),
        (InterlaceError("x"), 500, None),
        (RecursionError(), 400, None),
    ],
)
def test_statuses(error, status, retry):
    found = describe(error)
    assert found.status == status and found.headers.get("Retry-After") == retry
