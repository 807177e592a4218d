"""The contract of checkpoints (version 1): where weights, configuration and tokenizer of a model come from.

A provider must be importable without torch: the front process reads configuration and tokenizer, only workers read
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from interlace.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from interlace.interfaces.weights import BlockWeight
    from interlace.tokenizer import Tokenizer


class Stored(NamedTuple):
    """How much a checkpoint holds in one format."""

    values: int
    nbytes: int
    in_blocks: bool = False
    """Whether matrices in this format come as `BlockWeight`s."""
    block_values: int = 1
    """Neighbouring values of a row that cannot be parted: those of a block."""


class Checkpoint(ABC):
    """One model on disk. Every method may raise `CheckpointError` naming file, cause and cure."""

    class Options(BaseModel):
        """Typed options; a subclass replaces this."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, options: BaseModel, path: Path) -> None:
        self.options: Any = options
        self.path = path

    @classmethod
    @abstractmethod
    def matches(cls, path: Path) -> bool:
        """Whether `path` (a file or directory that exists) is of this format. Looks at names and magic only."""

    @abstractmethod
    def raw_config(self) -> dict[str, Any]:
        """The architecture and its numbers in Hugging Face form (`architectures`, `hidden_size`, …).

        `eos_token_id` holds every token that ends a generation. Numbers may have names of the architecture's own
        (`n_embd`): the provider of the model says what they mean (`Provider.config`)."""

    def config(self) -> ModelConfig:
        """`raw_config` as `ModelConfig.from_hf` reads it, which suffices where the names are the standard ones."""
        return ModelConfig.from_hf(self.raw_config(), str(self.path))

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer with its special tokens and chat template."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, torch.Tensor | BlockWeight]]:
        """(Hugging Face weight name, weight) pairs in file order, read one at a time.

        A matrix that is quantised in blocks comes as a `BlockWeight`, which layers keep or decode; all else as tensors.
        Both may be views of a mapped file: nobody writes to them."""

    def num_weights(self) -> int | None:
        """How many pairs `weights` yields, for the progress bar; None if unknown."""
        return None

    def stored(self) -> dict[str, Stored] | None:
        """Format (`Q4_1`, `BF16`) → how much `weights` yields in it, for sizing before anything is loaded; None if
        unknown."""
        return None
