"""Parts of an engine that fail on purpose, named in a spec like any others, so that they reach every process."""

from __future__ import annotations

import os
import threading
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
CRASH_STATUS = 3


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


class StuckCheckpoint(UnreadableCheckpoint):
    """Its weights never come."""

    def weights(self) -> NoReturn:
        threading.Event().wait()
        raise AssertionError("nobody sets it")


class CrashingCheckpoint(UnreadableCheckpoint):
    """Whoever reads its weights is gone, without a word."""

    def weights(self) -> NoReturn:
        os._exit(CRASH_STATUS)


class StuckProcessor(LogitsProcessor):
    """A step with a request that names it never ends."""

    def add(self, slot: int, args: Any, prompt_token_ids: Sequence[int]) -> None: ...

    def remove(self, slot: int) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        threading.Event().wait()


class FailingProcessor(LogitsProcessor):
    """Fails the rows of requests that name it, and harms no other."""

    def add(self, slot: int, args: Any, prompt_token_ids: Sequence[int]) -> None: ...

    def remove(self, slot: int) -> None: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[LogitsRow]) -> None:
        raise ValueError(MESSAGE)


def unreadable() -> Component:
    """`UnreadableCheckpoint` as part of a spec."""
    return Component(kind="checkpoints", name="unreadable", target=f"{__name__}:UnreadableCheckpoint")


def stuck_loading() -> Component:
    """`StuckCheckpoint` as part of a spec."""
    return Component(kind="checkpoints", name="stuck", target=f"{__name__}:StuckCheckpoint")


def crashing() -> Component:
    """`CrashingCheckpoint` as part of a spec."""
    return Component(kind="checkpoints", name="crashing", target=f"{__name__}:CrashingCheckpoint")


def stuck() -> Component:
    """`StuckProcessor` as part of a spec."""
    return Component(kind="logits_processors", name="stuck", target=f"{__name__}:StuckProcessor")


def failing() -> Component:
    """`FailingProcessor` as part of a spec."""
    return Component(kind="logits_processors", name="failing", target=f"{__name__}:FailingProcessor")
