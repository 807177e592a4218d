"""The contract of models (version 1): an architecture, written over `interlace.layers` only.

A model knows its layers and the names of its weights. It knows nothing of requests, paging, batching or devices:
`ForwardContext` carries the step's attention state explicitly from model to layer to attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from interlace.interfaces.attention import AttentionBackend, AttentionSpec

if TYPE_CHECKING:
    from interlace.interfaces.kernels import Kernels
    from interlace.model_config import ModelConfig


class Parallel:
    """This rank's place in tensor parallelism. The base class is a single rank: every collective is the identity."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of all ranks, concatenated along the last dimension."""
        return x


class BuildContext(NamedTuple):
    """What layers are built with."""

    kernels: Kernels
    parallel: Parallel
    dtype: torch.dtype
    device: torch.device
    max_model_len: int


class LayerCache(NamedTuple):
    """Where one attention layer's keys and values live."""

    backend: AttentionBackend
    cache: torch.Tensor
    group: int


class ForwardContext:
    """Attention state of one step, handed from model to layer to attention."""

    __slots__ = ("layers", "metadata")

    def __init__(self, layers: list[LayerCache], metadata: list[Any]) -> None:
        self.layers = layers
        self.metadata = metadata

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Paged attention of attention layer `layer`; shapes as in `AttentionBackend.forward`."""
        backend, cache, group = self.layers[layer]
        return backend.forward(query, key, value, cache, self.metadata[group])


class ModelOutput(NamedTuple):
    """Result of `Model.forward`."""

    hidden: torch.Tensor
    """[tokens, hidden], after the final norm."""
    aux: dict[str, torch.Tensor]
    """Open names, for drafters and observers; usually empty."""


class Model(ABC):
    """One architecture family on one rank."""

    takes_blocks: ClassVar[bool] = False
    """Whether `load_weights` understands `BlockWeight`, as `interlace.layers` does. Where it does not, what a
    checkpoint ships in blocks comes decoded to float32."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        """Allocate modules without values; `load_weights` fills them."""
        self.config = config

    @classmethod
    @abstractmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1) -> list[AttentionSpec]:
        """One spec per attention layer, in layer order, as seen by one rank. Needs no weights."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Values in the weights of the whole model, known as soon as it is built (also on device `meta`)."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Consume (checkpoint name, weight) pairs, then make the model ready to run. Weights are tensors or, if
        `takes_blocks`, also `BlockWeight`s.

        Raises `CheckpointError` naming every missing, unexpected or wrongly shaped tensor."""

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> ModelOutput:
        """Hidden states of the flattened batch. `token_ids`, `positions`: [tokens] int64."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab] in float32."""
