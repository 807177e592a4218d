"""256 clients that stream at the same time, from a real server with the embedded model."""

import asyncio
import json

import httpx
import psutil
import pytest

CLIENTS = 256
TOKENS = 8


class Clients:
    """Conversations on bare connections, which cost this process so little that it is the server that is tested."""

    def __init__(self, server, topic):
        self._server = server
        self._topic = topic
        self.begun = 0
        self.tokens = 0
        self.begun_at_half = None

    async def run(self, count):
        """All at once. Returns the tokens each got."""
        self._half = count * TOKENS // 2
        port = int(self._server.url.rpartition(":")[2])
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        answers = await asyncio.gather(*(self._ask(i, *stream) for i, stream in enumerate(streams)))
        for _, writer in streams:
            writer.close()
            await writer.wait_closed()
        return answers

    async def _ask(self, number, reader, writer):
        body = {
            "messages": [{"role": "user", "content": f"Tell me fact number {number} about the {self._topic}."}],
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        usage, chunks = None, 0
        while (line := await reader.readline()) != b"data: [DONE]\n":
            assert line, "the stream ended early"
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk["usage"] or usage
                if chunks == 1:  # the first one tells the role only
                    self.begun += 1
                chunks += 1
        await reader.readuntil(b"\r\n0\r\n\r\n")
        self.tokens += usage["completion_tokens"]
        if self.begun_at_half is None and self.tokens >= self._half:
            self.begun_at_half = self.begun
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
    real = {"model": "smollm2", "checkpoint.use": "auto", "dtype": "auto", "cache.memory": "512MiB", "threads": 2}
    server = start(real)
    front = psutil.Process(server.process.pid)
    processes = [front, *front.children()]
    async with httpx.AsyncClient(base_url=server.url, timeout=300, verify=False) as client:
        files, blocks = front.num_fds(), await idle_blocks(client)
        assert await Clients(server, "sun").run(CLIENTS) == [TOKENS] * CLIENTS
        memory = resident(processes)  # from here on: what is allocated at first use is in use, the KV cache above all
        clients = Clients(server, "moon")
        assert await clients.run(CLIENTS) == [TOKENS] * CLIENTS
        assert clients.begun_at_half == CLIENTS  # half of it was not for half of them
        assert await idle_blocks(client) == blocks
        load = (await client.get("/load")).json()
        assert (load["running"], load["waiting"]) == (0, 0)
        grown = [after - before for after, before in zip(resident(processes), memory, strict=True)]
        assert max(grown) < 96 << 20, grown
    async with asyncio.timeout(30):
        while front.num_fds() > files:
            await asyncio.sleep(0.1)
    assert "ERROR" not in server.log
    assert "Traceback" not in server.log
