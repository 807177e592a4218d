"""The logits processor `watermark` (Kirchenbauer et al. 2023, arXiv 2301.10226, the soft rule of algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from interlace.interfaces.logits_processor import LogitsProcessor, LogitsRow
from pydantic import BaseModel, ConfigDict

from interlace_watermark.greenlist import is_green, seed_of
from interlace_watermark.options import Delta, Gamma, Key, WatermarkOptions

if TYPE_CHECKING:
    import torch


class Mark(NamedTuple):
    """The watermark of one request."""

    seed: int
    gamma: float
    delta: float
    last_prompt_token: int


class Watermark(LogitsProcessor):
    """Adds `delta` to the logits of green tokens. Which ones are green depends on the token before, and on the key."""

    class Options(WatermarkOptions):
        """Stated in a module of their own."""

    class Args(BaseModel):
        """What one request may say; what it leaves out is as in the options."""

        model_config = ConfigDict(extra="forbid")

        key: Key | None = None
        gamma: Gamma | None = None
        delta: Delta | None = None

    def __init__(self, options: BaseModel, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self._marks: dict[int, Mark] = {}
        self._tokens = np.arange(vocab_size, dtype=np.uint64)

    def add(self, slot: int, args: Args, prompt_token_ids: Sequence[int]) -> None:
        key = args.key or self.options.key
        if key is None:
            raise ValueError(
                "a watermark needs a key: give one with the request, logits_processors = "
                '{"watermark": {"key": "…"}}, or to the engine, logits_processors.options.watermark.key'
            )
        gamma = self.options.gamma if args.gamma is None else args.gamma
        delta = self.options.delta if args.delta is None else args.delta
        self._marks[slot] = Mark(seed_of(key.get_secret_value()), gamma, delta, prompt_token_ids[-1])

    def remove(self, slot: int) -> None:
        self._marks.pop(slot, None)

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        for row, slot, output_token_ids in rows:
            mark = self._marks[slot]
            previous = output_token_ids[-1] if len(output_token_ids) else mark.last_prompt_token
            green = is_green(mark.seed, previous, self._tokens, mark.gamma)  # [vocab]
            logits[row] += logits.new_tensor(green * mark.delta)
