"""GPT-2 for Interlace. Every engine imports this module at start-up, so it only names things."""

from __future__ import annotations

from collections.abc import Iterable

from interlace import Provider, hookimpl


@hookimpl
def interlace_models() -> Iterable[Provider]:
    yield Provider(
        name="GPT2LMHeadModel",
        target="interlace_gpt2.model:GPT2LMHeadModel",
        config="interlace_gpt2.config:standard_config",
        summary="GPT-2 and models of its shape (DistilGPT-2, DialoGPT, …)",
        api="1",
    )
