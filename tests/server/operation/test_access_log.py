"""Request ids, and what the log says of a request."""

import logging

import pytest
from starlette.responses import JSONResponse, StreamingResponse

from interlace.clock import VirtualClock
from interlace.server.access import AccessLog


async def ask(app, *, request_id=None, path="/v1/completions", body=b"the secret prompt", **options):
    """(state the application saw, messages sent)"""
    headers = [] if request_id is None else [(b"x-request-id", request_id.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("1.2.3.4", 5)}
    scope["query_string"] = b"key=sk-secret"
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    middleware = AccessLog(app, VirtualClock(), **({"lines": True, "contents": False} | options))
    await middleware(scope, receive, send)
    return scope["state"], sent


async def answer(scope, receive, send):
    await receive()
    await JSONResponse({"text": "the secret answer"})(scope, receive, send)


def header_of(sent):
    return dict(sent[0]["headers"])[b"x-request-id"].decode()


@pytest.mark.parametrize("given", ["abc", "A-b_c.d:9", "x" * 128])
async def test_a_good_id_comes_back(given):
    state, sent = await ask(answer, request_id=given)
    assert state["request_id"] == header_of(sent) == given


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "new\nline", "ünï", "a;b", None])
async def test_a_bad_id_is_replaced(given):
    state, sent = await ask(answer, request_id=given)
    assert state["request_id"] == header_of(sent) != given
    assert len(header_of(sent)) == 32


async def test_ids_differ():
    assert len({header_of((await ask(answer))[1]) for _ in range(50)}) == 50


async def test_one_line_without_contents_or_query(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, request_id="mine")
    [record] = caplog.records
    assert record.getMessage() == "1.2.3.4 POST '/v1/completions' 200 in 0.000 s (mine)"
    assert record.fields["request_id"] == "mine"
    assert "secret" not in caplog.text + str(record.__dict__)


async def test_contents_are_logged_on_request_only(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, request_id="mine", contents=True)
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "request of mine: the secret prompt",
        'answer of mine: {"text":"the secret answer"}',
    ]


async def test_logged_contents_are_bounded(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, contents=True, body=b"x" * 1_000_000)
    assert max(len(record.getMessage()) for record in caplog.records) < 66_000


async def test_probes_are_quiet_while_they_go_well(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, path="/health")
    assert caplog.records == []

    async def ill(scope, receive, send):
        await JSONResponse({}, status_code=503)(scope, receive, send)

    await ask(ill, path="/health")
    assert caplog.records[0].fields["status"] == 503


async def test_no_lines_when_they_are_off(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, lines=False)
    assert caplog.records == []


async def test_a_path_cannot_forge_a_line(caplog):
    caplog.set_level(logging.INFO, "interlace.access")
    await ask(answer, path="/x\nINFO forged")
    assert "\n" not in caplog.records[0].getMessage()


async def test_streams_pass_piece_by_piece_and_a_cut_is_said(caplog):
    caplog.set_level(logging.INFO, "interlace.access")

    async def pieces():
        for i in range(3):
            yield f"piece {i}"

    async def stream(scope, receive, send):
        await StreamingResponse(pieces())(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)

    _, sent = await ask(stream)
    assert [message.get("body") for message in sent[1:4]] == [b"piece 0", b"piece 1", b"piece 2"]

    async def cut(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    await ask(cut)
    assert [record.fields["complete"] for record in caplog.records] == [True, False]
    assert "cut off" in caplog.records[1].getMessage()


async def test_a_failure_is_logged_and_goes_on(caplog):
    caplog.set_level(logging.INFO, "interlace.access")

    async def failing(scope, receive, send):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        await ask(failing)
    assert caplog.records[0].fields["complete"] is False
