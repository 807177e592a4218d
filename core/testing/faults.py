"""Parts of an engine that fail on purpose, named in a spec like any others, so that they reach every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from interlace.errors import CheckpointError
from interlace.interfaces.checkpoint import Checkpoint
from interlace.interfaces.logits_processor import LogitsProcessor, LogitsRow
from interlace.spec import Component

if TYPE_CHECKING:
    import torch

    from interlace.tokenizer import Tokenizer

MESSAGE = "broken on purpose"


class UnreadableCheckpoint(Checkpoint):
    """Its weights cannot be read."""

    @classmethod
    def matches(cls, path: Any) -> bool:
        return False

    def raw_config(self) -> NoReturn:
        raise CheckpointError(MESSAGE)

    def tokenizer(self) -> Tokenizer:
        raise CheckpointError(MESSAGE)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise CheckpointError(MESSAGE)


class FailingProcessor(LogitsProcessor):
    """Fails the rows of requests that name it, and harms no other."""

    def add(self, slot: int, args: Any, prompt_token_ids: Sequence[int]) -> None: ...

    def remove(self, slot: int) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        raise ValueError(MESSAGE)


def unreadable() -> Component:
    """`UnreadableCheckpoint` as part of a spec."""
    return Component(kind="checkpoints", name="unreadable", target=f"{__name__}:UnreadableCheckpoint")


def failing() -> Component:
    """`FailingProcessor` as part of a spec."""
    return Component(kind="logits_processors", name="failing", target=f"{__name__}:FailingProcessor")
