"""The load generator over real HTTP: exact times by a clock that the server moves, and every way to fail."""

import asyncio
import json
import socket

import pytest

from interlace.bench.serve.client import Exchange
from interlace.bench.serve.load import Watcher, run_load
from interlace.bench.serve.metrics import e2e, gaps, tpot, ttft
from interlace.bench.serve.sse import EventReader
from interlace.bench.serve.target import Target, TargetError, probe, served_models
from interlace.bench.serve.workloads import ServeItem
from interlace.clock import MonotonicClock, VirtualClock


def target(url, endpoint="completions", **fields):
    return Target(base_url=url, endpoint=endpoint, model="fake-model", **fields)


async def one(target, clock=None, tokens=3, prompt="hello") -> Exchange:
    run = await run_load(target, [ServeItem(prompt, tokens)], [0.0], clock or MonotonicClock())
    return run.exchanges[0]


# ── What is measured ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_times_are_exactly_those_of_the_server(fake_here, endpoint):
    """The clock stands still except where the server moves it, after the client has noted the token before."""
    fake, url = fake_here
    clock, watcher = VirtualClock(100.0), Watcher()

    async def script(body, reply):
        if "messages" in body:  # a role alone is no token
            await reply.event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for number, pause in enumerate((0.5, 0.25, 0.25, 1.0)):
            clock.advance(pause)
            await reply.token(" word", "stop" if number == 3 else None)
            while watcher.tokens <= number:
                await asyncio.sleep(0.001)
        await reply.usage(4, prompt_tokens=7, cached_tokens=2)
        await reply.done()

    fake.script = script
    run = await run_load(target(url, endpoint), [ServeItem("hi", 4)], [0.0], clock, watcher=watcher)
    [found] = run.exchanges
    assert found.error is None and found.sent == 100.0
    assert (ttft(found), gaps(found), e2e(found)) == (0.5, [0.25, 0.25, 1.0], 2.0)
    assert tpot(found) == 0.5 and run.duration_s == 2.0
    assert (found.prompt_tokens, found.output_tokens, found.cached_tokens) == (7, 4, 2)
    assert found.finish_reason == "stop"


async def test_requests_say_what_is_asked(fake_here):
    fake, url = fake_here
    await one(target(url, api_key="sesame", extra_body={"top_k": 5, "stream_options": {"more": True}}), prompt=[4, 5])
    await one(target(url, "chat", temperature=0.7, ignore_eos=False, include_usage=False), prompt="hi")
    completion, chat = fake.bodies
    assert completion == {
        "model": "fake-model",
        "stream": True,
        "temperature": 0.0,
        "prompt": [4, 5],
        "max_tokens": 3,
        "ignore_eos": True,
        "top_k": 5,
        "stream_options": {"include_usage": True, "more": True},
    }
    assert chat == {
        "model": "fake-model",
        "stream": True,
        "temperature": 0.7,
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 3,
    }
    assert fake.keys == ["Bearer sesame", None]


async def test_tokens_of_a_packed_chunk_are_counted_where_the_server_tells(fake_here):
    fake, url = fake_here

    async def ids(body, reply):
        await reply.token(" a b", token_ids=[1, 2])
        await reply.token(" c", "length", token_ids=[3])
        await reply.done()

    async def logprobs(body, reply):
        await reply.token(" a b", logprobs={"tokens": [" a", " b"], "token_logprobs": [-1, -2]})
        await reply.token(" c", "length", logprobs={"tokens": [" c"]})
        await reply.done()

    async def running(body, reply):
        for text, total, reason in ((" a b", 2, None), (" c", 3, "length")):
            choice = {"index": 0, "text": text, "finish_reason": reason}
            await reply.event(choices=[choice], usage={"prompt_tokens": 1, "completion_tokens": total})
        await reply.usage(3)
        await reply.done()

    for script, how in ((ids, "token_ids"), (logprobs, "logprobs"), (running, "usage")):
        fake.script = script
        found = await one(target(url))
        assert (found.error, found.chunk_tokens, found.counted_by, found.num_tokens) == (None, [2, 1], how, 3)


async def test_events_are_read_however_they_are_cut():
    stream = b': hi\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:{"b"\ndata: :2}\n\n\ndata: [DONE]\n\n'
    expected = [b'{"a": 1}', b'{"b"\n:2}', b"[DONE]"]
    for size in range(1, len(stream) + 1):
        reader = EventReader()
        found = [data for at in range(0, len(stream), size) for data in reader.feed(stream[at : at + size])]
        assert found == expected, size


# ── What fails ──────────────────────────────────────────────────────────────────────────────────────────────────


async def full(body, reply):
    await reply.refuse(503, "the queue is full")


async def cut(body, reply):
    await reply.token(" a")
    reply.hang_up()


async def unfinished(body, reply):
    await reply.token(" a")
    await reply.done()


async def broken(body, reply):
    await reply.write(b"data: {not json\n\n")


async def wrong_type(body, reply):
    await reply.write(b'data: {"choices": 5}\n\n')


async def told(body, reply):
    await reply.token(" a")
    await reply.event(error={"message": "the engine died", "type": "server_error", "code": 500})
    await reply.done()


async def silent(body, reply):
    await reply.token("", "stop")
    await reply.done()


async def aborted(body, reply):
    await reply.token(" a", "abort")
    await reply.done()


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        (full, "http_503", "the queue is full"),
        (cut, "disconnected", ""),
        (unfinished, "incomplete", "without a finish_reason"),
        (broken, "malformed", "cannot be read"),
        (wrong_type, "malformed", "cannot be read"),
        (told, "stream_error", "server_error: the engine died"),
        (silent, "empty", "no text"),
        (aborted, "failed", "finish_reason is 'abort'"),
    ],
)
async def test_every_failure_has_its_kind(fake_here, script, kind, said):
    fake, url = fake_here
    fake.script = script
    found = await one(target(url))
    assert found.error == kind and said in found.message


async def test_an_answer_that_does_not_come_ends_by_the_timeout(fake_here):
    fake, url = fake_here
    over = asyncio.Event()

    async def hang(body, reply):
        await reply.token(" a")
        await over.wait()

    fake.script = hang
    found = await one(target(url, timeout_s=0.1))
    over.set()
    assert found.error == "timeout" and "within 0.1 s" in found.message


async def test_a_server_that_is_not_there_is_an_error_of_each_request():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        assert (await one(target(url))).error == "connect"
        with pytest.raises(TargetError, match=r"cannot be reached.*Is the server up"):
            await served_models(url, None)


# ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_no_more_requests_are_under_way_than_allowed(fake_here):
    fake, url = fake_here
    now, most = 0, 0

    async def script(body, reply):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        await reply.token(" a", "length")
        now -= 1
        await reply.done()

    fake.script = script
    run = await run_load(target(url), [ServeItem("x", 1)] * 20, [0.0] * 20, MonotonicClock(), max_concurrency=3)
    assert most == 3 and all(found.error is None for found in run.exchanges)
    assert [found.index for found in run.exchanges] == list(range(20))
    assert max(found.ready - found.due for found in run.exchanges) >= 0.005 * 5  # six rounds of three and a rest
    # Each takes the place of one that has ended, so at any of these moments one ended.
    assert {found.ready for found in run.exchanges[3:]} <= {found.ended for found in run.exchanges}


async def test_requests_are_sent_when_they_are_due_and_not_before(fake_here):
    _, url = fake_here
    times = [0.0, 0.03, 0.03, 0.09]
    run = await run_load(target(url), [ServeItem("x", 1)] * 4, times, MonotonicClock())
    assert [found.due - run.started for found in run.exchanges] == pytest.approx(times)
    assert all(found.sent >= found.due == found.ready for found in run.exchanges)


async def test_one_failure_leaves_the_others_alone(fake_here):
    fake, url = fake_here
    say_words = fake.script

    async def script(body, reply):
        await (cut if body["prompt"] == "bad" else say_words)(body, reply)

    fake.script = script
    items = [ServeItem("bad" if number % 3 == 0 else "good", 2) for number in range(9)]
    run = await run_load(target(url), items, [0.0] * 9, MonotonicClock())
    assert [found.error for found in run.exchanges] == ["disconnected", None, None] * 3


# ── Finding out what the server takes ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        (set(), (True, True)),
        ({"stream_options"}, (True, False)),
        ({"ignore_eos"}, (False, True)),
        ({"ignore_eos", "stream_options"}, (False, False)),
    ],
)
async def test_the_probe_leaves_out_what_the_server_refuses(fake_here, refused, left):
    fake, url = fake_here
    fake.refused = refused
    found = await probe(target(url), ServeItem("x", 50), MonotonicClock(), "auto")
    assert (found.ignore_eos, found.include_usage) == left
    assert {body["max_tokens"] for body in fake.bodies} == {2}


async def test_the_probe_says_why_nothing_works(fake_here):
    fake, url = fake_here
    fake.refused = {"ignore_eos"}
    with pytest.raises(TargetError, match=r"http_400.*Unknown parameter: ignore_eos"):
        await probe(target(url), ServeItem("x", 5), MonotonicClock(), "on")

    async def locked(body, reply):
        await reply.refuse(401, "no key")

    fake.refused, fake.script = set(), locked
    fake.bodies.clear()
    with pytest.raises(TargetError, match=r"no key.*--api-key-file"):
        await probe(target(url), ServeItem("x", 5), MonotonicClock(), "auto")
    assert len(fake.bodies) == 1, "only a refused field is worth another try"


async def test_models_are_listed(fake_here):
    _, url = fake_here
    assert await served_models(url, None) == ["fake-model", "another"]
    with pytest.raises(TargetError, match=r"404.*Does --base-url end in /v1"):
        await served_models(url.removesuffix("/v1"), None)


def test_a_body_is_plain_json():
    body = json.loads(target("http://x/v1/").body(ServeItem("ü", 1)))
    assert body["prompt"] == "ü" and target("http://x/v1/").url == "http://x/v1/completions"
