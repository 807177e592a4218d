"""A watermark in generated text, and its detector. Every engine imports this module, so it only names things."""

from __future__ import annotations

from collections.abc import Iterable

from interlace import Provider, hookimpl


@hookimpl
def interlace_logits_processors() -> Iterable[Provider]:
    yield Provider(
        name="watermark",
        target="interlace_watermark.logits_processor:Watermark",
        options="interlace_watermark.options:WatermarkOptions",
        summary="prefer a secret part of the vocabulary, so that text can be recognised",
        api="1",
    )
