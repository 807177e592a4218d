"""What every logits processor must do. The package has to be installed: the suite finds it as an engine does."""

from __future__ import annotations

from interlace.testing import LogitsProcessorConformance


class TestWatermark(LogitsProcessorConformance):
    logits_processor = "watermark"
    args = {"key": "a secret"}
    bad_args = [{"key": ""}, {"key": "a secret", "gamma": 1.0}, {"key": "a secret", "delta": -1}, {"kye": "a secret"}]
