"""What the server says once it is ready: where it is, what it is called, who may call it, and how."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interlace.server.serve import Prepared


def report(prepared: Prepared, seconds: float) -> list[str]:
    """Lines for the log. The engine's own, with the plugins and why they were chosen, come before."""
    settings, listener = prepared.loaded.settings.server, prepared.listener
    first, *aliases = prepared.model_names
    also = f" (also as {', '.join(aliases)})" if aliases else ""
    if prepared.keys:
        keys = f"{len(prepared.keys)} API keys; all routes but /health, /ready and the page's files need one"
    else:
        keys = "no API keys: whoever reaches the address may call it"
    lines = [f"serving {first}{also} at {listener.url} after {seconds:.2f} s", keys]
    extras = [name for name, on in (("/docs", settings.docs), ("/metrics", settings.metrics)) if on]
    if settings.page:
        extras.append("the page at /")
    if extras:
        lines.append(f"also served: {', '.join(extras)}")
    lines.append(f"try: {_curl(prepared, first)}")
    return lines


def _curl(prepared: Prepared, model: str) -> str:
    """A command line that works from this machine."""
    settings, listener = prepared.loaded.settings.server, prepared.listener
    words = ["curl"]
    base = listener.url
    if listener.unix_path is not None:
        words += ["--unix-socket", str(listener.unix_path)]
        base = "http://localhost"
    if prepared.keys:
        words += ["-H", "'Authorization: Bearer KEY'"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    words += [f"{base}{settings.root_path}/v1/chat/completions", "-H", "'Content-Type: application/json'"]
    return " ".join([*words, "-d", f"'{json.dumps(body)}'"])
