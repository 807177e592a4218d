"""256 clients that stream at the same time, from a real server with the embedded model."""

import asyncio
import json

import httpx
import psutil
import pytest

CLIENTS = 256
TOKENS = 8
ROUNDS = 2


class Clients:
    """Many conversations, and the order in which they began and ended."""

    def __init__(self, client):
        self._client = client
        self.events = []

    async def talk(self, number):
        """One client: its questions one after the other. Returns the tokens it got for each."""
        counts = [await self._ask(number, turn) for turn in range(ROUNDS)]
        self.events.append("ended")
        return counts

    async def _ask(self, number, turn):
        body = {
            "messages": [{"role": "user", "content": f"Tell me fact number {number} about turn {turn}."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage, last = None, ""
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if turn == 0 and not last and chunk["choices"]:
                        self.events.append("began")
                    usage = chunk["usage"] or usage
                last = line or last
        assert last == "data: [DONE]"
        return usage["completion_tokens"]


async def idle_blocks(client):
    """Free KV blocks, once nothing runs."""
    async with asyncio.timeout(60):
        while True:
            engine = (await client.get("/live")).json()["engine"]
            if engine is not None and not engine["num_running"] and not engine["num_waiting"]:
                return engine["num_free_blocks"]
            await asyncio.sleep(0.5)


def resident(processes):
    return [process.memory_info().rss for process in processes]


@pytest.mark.slow
async def test_many_clients_stream_at_once(start):
    server = start({"model": "smollm2", "checkpoint.use": "auto", "cache.memory": "512MiB", "threads": 2})
    front = psutil.Process(server.process.pid)
    processes = [front, *front.children()]
    limits = httpx.Limits(max_connections=CLIENTS + 4, max_keepalive_connections=4)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, verify=False) as client:
        await Clients(client).talk(-1)
        files, memory, blocks = front.num_fds(), resident(processes), await idle_blocks(client)
        clients = Clients(client)
        results = await asyncio.gather(*(clients.talk(number) for number in range(CLIENTS)))
        assert results == [[TOKENS] * ROUNDS] * CLIENTS
        # Fair: nobody was through with everything before everybody had got something.
        assert clients.events[:CLIENTS] == ["began"] * CLIENTS
        assert await idle_blocks(client) == blocks
        load = (await client.get("/load")).json()
        assert (load["running"], load["waiting"]) == (0, 0)
        grown = [after - before for after, before in zip(resident(processes), memory, strict=True)]
        assert max(grown) < 300 << 20, grown
    async with asyncio.timeout(30):
        while front.num_fds() > files:
            await asyncio.sleep(0.1)
    assert "ERROR" not in server.log
    assert "Traceback" not in server.log
