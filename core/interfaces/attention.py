"""The contract of attention backends (version 1): paged attention over one KV group, mixed prefill and decode.

A backend owns the layout of the cache and writes it. One instance serves one KV group of one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from interlace.worker.batch import DecodeBatch, ForwardBatch


class AttentionSpec(msgspec.Struct, frozen=True):
    """What one attention layer needs. Layers with equal `kv_key` share a KV group."""

    num_heads: int
    """Query heads on this rank."""
    num_kv_heads: int
    """KV heads on this rank."""
    head_size: int
    kind: str = "full"
    """Open name: `full` or `window`; later `mla`, `state`."""
    window: int = 0
    """For kind `window`: a token sees itself and the `window - 1` tokens before it."""
    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0 = off."""
    scale: float = 0.0
    """Multiplier of the scores; 0 means head_size ** -0.5."""

    @property
    def kv_key(self) -> tuple[str, int, int, int, int, float, float]:
        """What decides the group: what the cache holds (kind, window, KV heads, head size), then what else a backend
        is built for, so that one backend serves all layers of a group."""
        return (
            self.kind,
            self.window,
            self.num_kv_heads,
            self.head_size,
            self.num_heads,
            self.softcap,
            self.softmax_scale,
        )

    @property
    def softmax_scale(self) -> float:
        return self.scale or self.head_size**-0.5


class CacheLayout(msgspec.Struct, frozen=True):
    """Shape and dtype (a torch dtype name) of one layer's cache tensor; the first dimension counts blocks."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class HeadNorms(NamedTuple):
    """RMS norms of single heads, as `Kernels.rms_norm` computes them."""

    query: torch.Tensor
    """[head_size], the weight for queries."""
    key: torch.Tensor
    """[head_size], the weight for keys."""
    eps: float
    unit_offset: bool = False
    """The weights are stored less 1."""


class HeadTurn(NamedTuple):
    """What stands between a layer's projections and its attention: heads are normed, where the model does that, then
    turned by their positions. The same for every step."""

    cos_sin: torch.Tensor
    """[max_position, rotary] float32, as `Kernels.rope` takes it."""
    norms: HeadNorms | None = None


class AttentionBackend(ABC):
    """Paged attention. Block 0 is the null block: never written for a real token, never read unmasked."""

    class Options(BaseModel):
        """Typed options; a subclass replaces this."""

        model_config = ConfigDict(extra="forbid")

    batch_invariant: ClassVar[bool] = False
    """Whether a row's result has the same bits whatever else is in the batch, and however its prefill is cut."""
    graph_support: ClassVar[str] = "none"
    """Which batches `forward` may be captured for in a device graph: `none`, or `decode`, which means that
    `prepare_decode` is there."""

    turns_heads: bool = False
    """Whether `forward_turned` is there; an instance may decide by its options."""

    def __init__(self, options: BaseModel, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> None:
        self.options: Any = options
        self.spec = spec
        self.block_size = block_size
        self.dtype = dtype
        self.device = device

    @classmethod
    @abstractmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        """None if this backend can serve such layers here, else the reason against, as a clause."""

    @classmethod
    def auto_refusal(cls, device: str) -> str | None:
        """None, or why `attention.use = "auto"` should not ask this backend on `device` although it may run there, as a
        clause."""
        return None

    @abstractmethod
    def cache_layout(self, num_blocks: int) -> CacheLayout:
        """Layout of one layer's cache of `num_blocks` blocks of `block_size` tokens (keys and values)."""

    @abstractmethod
    def prepare(self, batch: ForwardBatch, group: int) -> Any:
        """Build this step's metadata for KV group `group` once; the result is given to `forward` of every layer."""

    def graph_refusal(self) -> str | None:
        """None if a decode step over this backend can be captured in a device graph, else the reason against, as a
        clause. A backend for which it depends on what is installed, or on the spec, extends this."""
        return None if self.graph_support == "decode" else "it does not support device graphs"

    def prepare_decode(self, batch: DecodeBatch, group: int) -> Any:
        """Metadata for KV group `group` of a step in which every row has one token, for capture in a device graph.

        Called once per graph, before capture, when the buffers hold padding only; the result is given to `forward` of
        every layer in the capture, and kept as long as the graph. So neither this method nor `forward` with its result
        may take a value of the buffers to the host, or decide by one: `forward` reads them when the graph is replayed,
        and which kernels it launches, on which grids, follows from shapes and `max_seq_len` only. Scratch memory may be
        allocated in either. Results of padding rows mean nothing, but nothing outside the null block may be written for
        them.

        Only called where `graph_refusal` says None."""
        raise NotImplementedError(f"{type(self).__name__} states graph_support = 'decode' without prepare_decode")

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
    ) -> torch.Tensor:
        """Write `key`, `value` [tokens, kv_heads, head_size] into `cache` at the batch's slots, then attend.

        `query` is [tokens, heads, head_size]; returns [tokens, heads, head_size]. Query head h reads KV head
        h // (heads / kv_heads). Causal: a token sees its own sequence up to itself (and within the window).
        """

    def forward_turned(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
        turn: HeadTurn,
    ) -> torch.Tensor:
        """As `forward`, but `query` and `key` come straight from the projections: the backend norms and turns them, as
        `turn` says for `positions` [tokens] int64, before it writes and attends. For backends that do all of it in one
        launch. Only called where `turns_heads`; may be captured where `forward` may."""
        raise NotImplementedError(f"{type(self).__name__} states turns_heads without forward_turned")
