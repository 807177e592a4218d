"""Interlace over HTTP: `interlace_server.py MODEL [--flag value …]` starts `interlace serve` and streams every answer.

Client and server share the machine, as in any test on one machine: the client's work counts against the server."""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request

import aiohttp
from common import serve

PORT = 8471
URL = f"http://127.0.0.1:{PORT}"


async def answer(session: aiohttp.ClientSession, prompt: list[int], length: int) -> int:
    """Stream one completion; the tokens that the server's usage counts."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    async with session.post(f"{URL}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b'data: {"') and b'"usage":{' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return tokens


async def answer_all(prompts: list[list[int]], max_tokens: list[int]) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
        return sum(await asyncio.gather(*map(answer, [session] * len(prompts), prompts, max_tokens)))


if __name__ == "__main__":
    MODEL = sys.argv[1]
    command = [os.path.join(os.path.dirname(sys.executable), "interlace"), "serve", "--model", *sys.argv[1:]]
    server = subprocess.Popen([*command, "--server.port", str(PORT), "--server.access_log", "false"])
    while True:
        try:
            urllib.request.urlopen(f"{URL}/ready").close()
            break
        except OSError:
            if server.poll() is not None:
                sys.exit(f"the server ended with status {server.returncode}")
            time.sleep(0.05)

    def generate(prompts: list[list[int]], max_tokens: list[int]) -> int:
        return asyncio.run(answer_all(prompts, max_tokens))

    serve("Interlace over HTTP, streaming", generate, lambda: None)
