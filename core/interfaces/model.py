"""The contract of models (version 1): an architecture, written over `interlace.layers` only.

A model knows its layers and the names of its weights. It knows nothing of requests, paging, batching or devices:
`ForwardContext` carries the step's attention state explicitly from model to layer to attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from interlace.interfaces.attention import AttentionBackend, AttentionSpec, HeadTurn

if TYPE_CHECKING:
    from interlace.interfaces.kernels import Kernels
    from interlace.model_config import ModelConfig


class Parallel:
    """This rank's place among the ranks that run one model together, and what it exchanges with them.

    The base class is a single rank: every collective is the identity. Calls come from the worker's thread, in the same
    order on all ranks that take part. A call raises when a peer is gone; the worker cannot go on then.
    """

    rank: int = 0
    """Tensor rank: which part of each layer this rank holds."""
    size: int = 1
    """Number of tensor ranks."""
    stage: int = 0
    """Pipeline stage: which layers this rank holds."""
    num_stages: int = 1
    stage_layers: tuple[int, ...] = ()
    """How many layers each stage holds; empty: as even as they can be."""

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    def layers_here(self, num_layers: int) -> range:
        """Which of a model's layers this stage holds: a run of them, as long as `stage_layers` says; where it says
        nothing, the first stages hold one more where they do not come out even."""
        if self.stage_layers:
            start = sum(self.stage_layers[: self.stage])
            return range(start, start + self.stage_layers[self.stage])
        each, more = divmod(num_layers, self.num_stages)
        first = self.stage * each + min(self.stage, more)
        return range(first, first + each + (self.stage < more))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the tensor ranks of this stage, with the same bits on each; may be written into `x`."""
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
        """`x` of all tensor ranks of this stage, concatenated along the last dimension. `widths`: how long that is on
        each of them; by default equally long."""
        return x

    def send(self, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """Hand both, [tokens, hidden] of one dtype, to the same tensor rank of the next stage. May return before they
        are taken, so the caller writes into neither afterwards. All tensor ranks of a stage send the same values."""
        raise RuntimeError("there is no next pipeline stage to send to")

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The (hidden, residual) that the previous stage sent next, each [num_tokens, hidden_size]."""
        raise RuntimeError("there is no previous pipeline stage to receive from")


class BuildContext(NamedTuple):
    """What layers are built with."""

    kernels: Kernels
    parallel: Parallel
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    grain: int = 1
    """Neighbouring inputs of a linear that ranks should not part: the longest block of the checkpoint's formats."""
    gather: bool = False
    """Whether linears whose inputs are spread over tensor ranks gather these, instead of summing what each rank makes
    of its own: no sum then crosses ranks, so several give the bits of one (see `interlace.layers.linear`)."""


class LayerCache(NamedTuple):
    """Where one attention layer's keys and values live."""

    backend: AttentionBackend
    cache: torch.Tensor
    group: int


class ForwardContext:
    """Attention state of one step, handed from model to layer to attention."""

    __slots__ = ("layers", "metadata")

    def __init__(self, layers: Mapping[int, LayerCache] | Sequence[LayerCache], metadata: Sequence[Any]) -> None:
        """`layers`: attention layer, as numbered in the whole model → where it keeps its data, for those of this stage;
        `metadata`: what the backend of each KV group prepared."""
        self.layers = layers
        self.metadata = metadata

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Paged attention of attention layer `layer`; shapes as in `AttentionBackend.forward`."""
        backend, cache, group = self.layers[layer]
        return backend.forward(query, key, value, cache, self.metadata[group])

    def turns_heads(self, layer: int) -> bool:
        """Whether attention layer `layer` is called by `attend_turned`."""
        return self.layers[layer].backend.turns_heads

    def attend_turned(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        turn: HeadTurn,
    ) -> torch.Tensor:
        """The same for queries and keys that are yet to be normed and turned; see `AttentionBackend.forward_turned`."""
        backend, cache, group = self.layers[layer]
        return backend.forward_turned(query, key, value, positions, cache, self.metadata[group], turn)


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
    supports_pipeline: ClassVar[bool] = False
    """Whether it can be one stage of several (`Parallel.num_stages`): it then builds the layers
    `parallel.layers_here(...)` only, the embedding on the first stage and norm and head on the last, and passes over
    the weights of the others. All of `interlace.layers.decoder.CausalLM` can."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        """Allocate modules without values; `load_weights` fills them."""
        self.config = config

    @classmethod
    @abstractmethod
    def attention_specs(cls, config: ModelConfig, tensor_parallel: int = 1, rank: int = 0) -> list[AttentionSpec]:
        """One spec per attention layer of the whole model, in layer order, as tensor rank `rank` of `tensor_parallel`
        sees it: ranks may hold different numbers of heads. Needs no weights."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Values in the weights that this rank holds (alone: all), known as soon as it is built (also on device
        `meta`)."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        """Consume (checkpoint name, weight) pairs, then make the model ready to run. Every rank is given all of
        them and keeps its own part. Weights are tensors or, if `takes_blocks`, also `BlockWeight`s.

        Raises `CheckpointError` naming every missing, unexpected or wrongly shaped tensor."""

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, ctx: ForwardContext) -> ModelOutput:
        """Hidden states of the flattened batch. `token_ids`, `positions`: [tokens] int64.

        Stages after the first `receive` what the one before `send`s, in place of the embedding; those before the last
        return a `hidden` of no tokens."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab] in float32. Called on all tensor ranks of the last stage alike."""
