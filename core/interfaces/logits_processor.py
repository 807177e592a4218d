"""The contract of logits processors (version 1): change logits of the requests that ask for it, in one batch.

Processors run between `forward` and `sample`, on the sampling rank. They are given one row per position, so they
also work while speculative drafts are verified.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class LogitsRow(NamedTuple):
    """One row of the logits tensor."""

    row: int
    """Row in `logits`."""
    slot: int
    """The request, as given to `add`."""
    output_token_ids: npt.NDArray[np.int32]
    """Tokens generated so far (drafts before this position included): a read-only view, valid during `apply`."""


class LogitsProcessor(ABC):
    """Batched logits processor. One instance per worker, called from one thread."""

    class Options(BaseModel):
        """Engine-wide options; a subclass replaces this."""

        model_config = ConfigDict(extra="forbid")

    class Args(BaseModel):
        """Arguments of one request, from `SamplingParams.logits_processors[name]`; a subclass replaces this.
        Validated at the front, so a bad request is refused before it reaches the engine."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, options: BaseModel, vocab_size: int) -> None:
        self.options: Any = options
        self.vocab_size = vocab_size

    @abstractmethod
    def add(self, slot: int, args: Any, prompt_token_ids: Sequence[int]) -> None:
        """A request that names this processor took `slot`; `args` is a validated `Args`. Raising fails the request."""

    @abstractmethod
    def remove(self, slot: int) -> None:
        """That request left its slot."""

    @abstractmethod
    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        """Change `logits` [rows, vocab] float32 in place, at the given rows only.

        A row's result may depend on that row and its request only. Raising fails the requests of the given rows.
        """
