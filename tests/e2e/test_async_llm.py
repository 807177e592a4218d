"""`AsyncLLM` with the embedded model."""

import asyncio

import pytest

from interlace import AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
ENDLESS = SamplingParams(max_tokens=2000, ignore_eos=True)
SETTINGS = {"cache": {"memory": "192MiB"}, "dtype": "float32"}


async def collect(llm, prompt, params=GREEDY, **options):
    text = ""
    async for output in llm.generate(prompt, params, **options):
        text += output.outputs[0].text
    return text


async def settle(condition):
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("process", ["inline", pytest.param("subprocess", marks=pytest.mark.slow)])
async def test_streams_cancels_and_frees(process):
    async with AsyncLLM(**SETTINGS, engine={"process": process}) as llm:
        texts = await asyncio.gather(*(collect(llm, p) for p in ("The capital of France is", "Once upon a time")))
        assert "Paris" in texts[0] and texts[1]
        assert texts[0] == await collect(llm, "The capital of France is")

        async def free():
            return await llm.control("free_blocks")

        before = await free()
        tasks = [asyncio.ensure_future(collect(llm, f"Tale number {i}:", ENDLESS)) for i in range(3)]

        async def running():
            return (await llm.health()).num_running == 3

        async def idle():
            return (await llm.health()).num_running == 0

        await settle(running)
        assert await free() < before
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await settle(idle)
        assert await free() == before

        async for output in llm.generate("Once upon", ENDLESS, "left"):
            assert output.request_id == "left"
            break
        await settle(idle)
        assert await free() == before
        assert (await llm.health()).status == "ok"
