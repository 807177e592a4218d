"""Built-in logits processors."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_logits_processors() -> Iterable[Provider]:
    yield Provider(
        name="no_repeat_ngram",
        target="interlace.plugins.logits_processors.no_repeat_ngram:NoRepeatNGram",
        summary="no sequence of `size` tokens occurs twice in prompt and output",
        api="1",
    )
