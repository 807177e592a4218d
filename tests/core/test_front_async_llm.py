"""`AsyncLLM` over a scripted engine."""

import asyncio
import gc

import pytest

from interlace import AsyncLLM, SamplingParams
from interlace.engine.front import Front
from interlace.errors import ConfigError, EngineDeadError, InvalidRequestError, RequestFailedError
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer, fake_assembly

TOKENIZER = byte_tokenizer()
LONG = SamplingParams(max_tokens=100)


def echo(request):
    return request.prompt_token_ids


def make(client) -> AsyncLLM:
    return AsyncLLM.from_front(Front(fake_assembly(client)))


async def collect(llm, prompt, params=LONG, **options):
    return [output async for output in llm.generate(prompt, params, **options)]


async def settle(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def test_deltas_join_to_the_answer():
    async with make(ScriptedClient(echo)) as llm:
        outputs = await collect(llm, "hello", request_id="mine")
    assert "".join(output.outputs[0].text for output in outputs) == "hello"
    ids = [token for output in outputs for token in output.outputs[0].token_ids]
    assert ids == TOKENIZER.encode("hello")
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs[0].finish_reason == "length"
    assert {output.request_id for output in outputs} == {"mine"}


async def test_many_at_once():
    async with make(ScriptedClient(echo)) as llm:
        prompts = [f"prompt number {i}" for i in range(20)]
        answers = await asyncio.gather(*(collect(llm, prompt) for prompt in prompts))
    assert ["".join(o.outputs[0].text for o in answer) for answer in answers] == prompts


async def test_samples_are_told_apart_by_index():
    async with make(ScriptedClient(echo)) as llm:
        texts = ["", ""]
        async for output in llm.generate("xyz", SamplingParams(n=2, max_tokens=9)):
            for answer in output.outputs:
                texts[answer.index] += answer.text
    assert texts == ["xyz", "xyz"]


async def test_a_slow_consumer_gets_merged_deltas():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        stream = llm.generate("abcdef", LONG)
        first = asyncio.ensure_future(anext(stream))
        await settle(lambda: client.running)
        client.step()
        assert (await first).outputs[0].text == "a"
        for _ in range(5):
            client.step()
        await asyncio.sleep(0)
        last = await anext(stream)
        assert last.outputs[0].text == "bcdef" and last.finished
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_leaving_the_loop_aborts_in_the_engine():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        task = asyncio.ensure_future(leave_after_first(llm))
        await settle(lambda: client.running)
        client.step()
        await task
        gc.collect()
        await settle(lambda: client.aborted == ["left"])
        assert client.running == []
        client.step()
        assert llm.front.find("left") is None


async def leave_after_first(llm):
    async for _ in llm.generate("abc", LONG, "left"):
        break


async def test_cancelling_aborts_in_the_engine():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        task = asyncio.ensure_future(collect(llm, "abc", request_id="gone"))
        await settle(lambda: client.running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.aborted == ["gone"] and client.running == []


async def test_a_finished_request_is_not_aborted():
    client = ScriptedClient(echo)
    async with make(client) as llm:
        await collect(llm, "abc")
        assert client.aborted == []


async def test_abort_by_id_ends_the_iterator_with_its_reason():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        task = asyncio.ensure_future(collect(llm, "abc", request_id="x"))
        await settle(lambda: client.running)
        client.step()
        assert await llm.abort("x") is True
        outputs = await task
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert "".join(output.outputs[0].text for output in outputs) == "a"
        client.step()
        assert await llm.abort("x") is False


async def test_a_failed_request_raises_and_the_others_go_on():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        bad = asyncio.ensure_future(collect(llm, "abc", request_id="bad"))
        good = asyncio.ensure_future(collect(llm, "de", request_id="good"))
        await settle(lambda: len(client.running) == 2)
        client.fail("bad", "past its deadline", "deadline")
        client.step()
        client.step()
        with pytest.raises(RequestFailedError, match="past its deadline") as caught:
            await bad
        assert caught.value.code == "deadline"
        assert "".join(output.outputs[0].text for output in await good) == "de"


async def test_invalid_requests_raise_and_nothing_starts():
    client = ScriptedClient(echo)
    async with make(client) as llm:
        for prompt in ("", [9999], {"what": 1}):
            with pytest.raises(InvalidRequestError):
                await collect(llm, prompt)
        await asyncio.gather(collect(llm, "ok", request_id="a"), return_exceptions=True)
    assert [request.id for request in client.added] == ["a"]


async def test_an_id_in_use_is_refused():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        task = asyncio.ensure_future(collect(llm, "abc", request_id="same"))
        await settle(lambda: client.running)
        with pytest.raises(InvalidRequestError, match="'same' is in use"):
            await collect(llm, "abc", request_id="same")
        while client.running:
            client.step()
        assert (await task)[-1].finished


async def test_engine_death_reaches_every_iterator():
    client = ScriptedClient(echo, auto=False)
    async with make(client) as llm:
        tasks = [asyncio.ensure_future(collect(llm, "abc")) for _ in range(3)]
        await settle(lambda: len(client.running) == 3)
        client.die(ValueError("broken"))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert all(isinstance(result.__cause__, ValueError) for result in results)
        with pytest.raises(EngineDeadError):
            await collect(llm, "abc")
        health = await llm.health()
        assert (health.status, health.last_cause) == ("dead", "ValueError: broken")
        assert str(await llm.wait_dead()) == "the engine stopped: ValueError: broken"


async def test_shutdown_ends_iterators_and_refuses_more():
    client = ScriptedClient(echo, auto=False)
    llm = make(client)
    task = asyncio.ensure_future(collect(llm, "abc"))
    await settle(lambda: client.running)
    await llm.shutdown()
    await llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await task
    with pytest.raises(EngineDeadError, match="shut down"):
        await collect(llm, "abc")


async def test_health_and_control():
    client = ScriptedClient(echo)
    async with make(client) as llm:
        assert (await llm.health()).status == "ok"
        assert await llm.control("reset_prefix_cache", deep=True) is True
    assert client.operations == [("reset_prefix_cache", {"deep": True})]


async def test_the_event_loop_goes_on_while_the_engine_starts(monkeypatch):
    import threading

    release = threading.Event()

    def slow_open(loaded, **options):
        assert release.wait(10)
        return Front(fake_assembly(ScriptedClient(echo)))

    monkeypatch.setattr(Front, "open", slow_open)
    llm = AsyncLLM()
    starting = [asyncio.ensure_future(collect(llm, "ab")) for _ in range(2)]
    await asyncio.sleep(0.02)
    release.set()
    for outputs in await asyncio.gather(*starting):
        assert outputs[-1].finished
    await llm.shutdown()


async def test_the_constructor_checks_settings_and_starts_nothing():
    with pytest.raises(ConfigError, match="schedular"):
        AsyncLLM(schedular={"use": "fcfs"})
    llm = AsyncLLM("some-model", **{"scheduler.use": "priority"}, plugins={"block": ["x"]})
    assert llm.loaded.settings.model == "some-model"
    assert llm.loaded.settings.scheduler.use == "priority"
    assert llm.loaded.settings.plugins.block == ["x"]
    with pytest.raises(EngineDeadError, match="not started"):
        _ = llm.front
