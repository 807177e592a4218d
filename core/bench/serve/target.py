"""The server under test: where it is, which model, and which request fields it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from interlace.bench.serve.client import Client, Exchange
from interlace.bench.serve.workloads import ServeItem
from interlace.clock import Clock
from interlace.errors import InterlaceError

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["chat", "completions"]
PROBE_TOKENS = 2
_PATHS = {"chat": "/chat/completions", "completions": "/completions"}


class TargetError(InterlaceError):
    """The server cannot be reached, or does not answer as an OpenAI server does."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server, an endpoint of it, and what every request says beside its prompt."""

    base_url: str
    """With the version: `http://127.0.0.1:8000/v1`."""
    endpoint: Endpoint
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0
    """Of one request; 0: none."""
    temperature: float = 0.0
    extra_body: dict[str, Any] = {}
    """Further fields of every request; they win over our own."""
    ignore_eos: bool = True
    """Ask for answers of exactly the wanted length, which is no field of OpenAI's own servers."""
    include_usage: bool = True

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.base_url.rstrip("/") + _PATHS[self.endpoint]

    @property
    def headers(self) -> dict[str, str]:
        return auth_headers(self.api_key)

    def body(self, item: ServeItem) -> bytes:
        """One request as it is sent."""
        fields: dict[str, Any] = {"model": self.model, "stream": True, "temperature": self.temperature}
        if self.endpoint == "chat":
            fields["messages"] = [{"role": "user", "content": item.prompt}]
            fields["max_completion_tokens"] = item.max_tokens
        else:
            fields["prompt"] = item.prompt
            fields["max_tokens"] = item.max_tokens
        if self.include_usage:
            fields["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        for name, value in self.extra_body.items():
            both = isinstance(value, dict) and isinstance(fields.get(name), dict)
            fields[name] = {**fields[name], **value} if both else value
        return msgspec.json.encode(fields)

    def client(self, session: aiohttp.ClientSession, clock: Clock) -> Client:
        return Client(session, self.url, self.headers, clock, self.timeout_s)


def auth_headers(api_key: str | None) -> dict[str, str]:
    """The header that shows a key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def open_session(timeout_s: float = 0.0) -> aiohttp.ClientSession:
    """An HTTP session without a limit on connections; `timeout_s` of whole requests, 0: the caller limits them."""
    import aiohttp

    limits = aiohttp.ClientTimeout(total=timeout_s or None)
    # auto_decompress: a compressed stream would come in lumps; we never ask for one.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=limits, headers={"Accept-Encoding": "identity"}
    )


async def served_models(base_url: str, api_key: str | None, timeout_s: float = 10.0) -> list[str]:
    """Names of `GET /models`. Raises `TargetError` saying what came instead."""
    import aiohttp

    url = base_url.rstrip("/") + "/models"
    try:
        async with open_session(timeout_s) as session, session.get(url, headers=auth_headers(api_key)) as response:
            text = await response.text(errors="replace")
            if response.status != 200:
                raise TargetError(f"{url} answered {response.status}: {text.strip()[:200]}{_advice(response.status)}")
            return [str(entry["id"]) for entry in json.loads(text)["data"]]
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise TargetError(f"{url} cannot be reached: {error or type(error).__name__}. Is the server up?") from error
    except (ValueError, TypeError, KeyError) as error:
        raise TargetError(f"{url} did not answer with a list of models; does --base-url end in /v1?") from error


def _advice(status: int) -> str:
    if status in (401, 403):
        return ". Give the key with --api-key-file FILE, or in the variable OPENAI_API_KEY"
    return ". Does --base-url end in /v1?" if status == 404 else ""


async def probe(target: Target, like: ServeItem, clock: Clock, ask_exact: Literal["auto", "on", "off"]) -> Target:
    """Send short requests of the form of `like` until one is accepted, leaving out fields that the server refuses (400,
    422), and return the target with the fields that remain. `ask_exact`: whether `ignore_eos` is tried, insisted on,
    or left out.

    Raises `TargetError` with the server's own message if none is accepted."""
    # So short that no prefix cache keeps anything of it: `like` will be sent again, and measured.
    short = ServeItem("Hello" if isinstance(like.prompt, str) else like.prompt[:1], PROBE_TOKENS)
    last: Exchange | None = None
    async with open_session() as session:
        for ignore_eos, include_usage in _field_sets(ask_exact):
            tried = msgspec.structs.replace(target, ignore_eos=ignore_eos, include_usage=include_usage)
            last = Exchange(index=0, asked_tokens=short.max_tokens, due=0.0, ready=0.0)
            await tried.client(session, clock).send(tried.body(short), last)
            # A model may have nothing to say to the probe, which still proves that the request is understood.
            if last.error in (None, "empty"):
                return tried
            if last.error not in ("http_400", "http_422"):
                break
    assert last is not None and last.error is not None
    advice = _advice(int(last.error[5:])) if last.error.startswith("http_") else ""
    raise TargetError(f"{target.url}: a first short request failed ({last.error}): {last.message}{advice}")


def _field_sets(ask_exact: Literal["auto", "on", "off"]) -> Sequence[tuple[bool, bool]]:
    """(ignore_eos, include_usage) to try, in order."""
    exact: Mapping[str, tuple[bool, ...]] = {"auto": (True, False), "on": (True,), "off": (False,)}
    return [(ignore_eos, usage) for ignore_eos in exact[ask_exact] for usage in (True, False)]
