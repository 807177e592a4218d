"""Interlace: a plugin-oriented engine for high-throughput LLM inference and serving.

The names below are loaded on first use, so that `import interlace` and `interlace --help` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "interlace":
    raise ImportError(f"this package is called 'interlace', not '{__name__}': install it (make setup) and import that")

if TYPE_CHECKING:
    from interlace.engine.async_llm import AsyncLLM as AsyncLLM
    from interlace.engine.llm import LLM as LLM
    from interlace.hookspecs import Provider as Provider
    from interlace.hookspecs import hookimpl as hookimpl
    from interlace.messages import RequestOutput as RequestOutput
    from interlace.messages import SamplingParams as SamplingParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "interlace.engine.llm",
    "AsyncLLM": "interlace.engine.async_llm",
    "SamplingParams": "interlace.sampling.params",
    "RequestOutput": "interlace.messages",
    "hookimpl": "interlace.hookspecs",
    "Provider": "interlace.hookspecs",
}

__all__ = ["LLM", "AsyncLLM", "Provider", "RequestOutput", "SamplingParams", "__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'interlace' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
