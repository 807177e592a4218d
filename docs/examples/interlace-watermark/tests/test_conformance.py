"""What every logits processor must do. The package has to be installed: the suite finds it as an engine does."""

from __future__ import annotations

from typing import ClassVar

from interlace.testing import LogitsProcessorConformance


class TestWatermark(LogitsProcessorConformance):
    logits_processor = "watermark"
    args: ClassVar = {"key": "a secret"}
