"""`no_repeat_ngram`: never repeat a sequence of `size` tokens that prompt or output already contain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.logits_processor import LogitsProcessor, LogitsRow

if TYPE_CHECKING:
    import torch


class NoRepeatNGram(LogitsProcessor):
    """Excludes the tokens that would complete an n-gram seen before (Paulus et al. 2017, section 2.5)."""

    class Args(BaseModel):
        model_config = ConfigDict(extra="forbid")

        size: int = Field(ge=1, strict=True, description="length of the sequences that may occur only once, in tokens")

    def __init__(self, options: BaseModel, vocab_size: int) -> None:
        super().__init__(options, vocab_size)
        self._requests: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}

    def add(self, slot: int, args: Args, prompt_token_ids: Sequence[int]) -> None:
        self._requests[slot] = (args.size, np.array(prompt_token_ids, dtype=np.int32))

    def remove(self, slot: int) -> None:
        self._requests.pop(slot, None)

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        for row, slot, output_token_ids in rows:
            size, prompt = self._requests[slot]
            banned = completions(np.concatenate((prompt, output_token_ids)), size)
            logits[row, banned[banned < self.vocab_size].tolist()] = -math.inf


def completions(tokens: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32]:
    """The tokens that followed earlier occurrences of the last `size - 1` tokens, without repeats, ascending."""
    if len(tokens) < size:
        return tokens[:0]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)  # [positions, size]
    last = tokens[len(tokens) - size + 1 :]
    return np.unique(windows[(windows[:, :-1] == last).all(axis=1), -1])
