"""Attention `triton`: paged attention for GPUs, in Triton (see plugins/triton).

Rows with few tokens (decoding, verifying a draft) go to a kernel that splits their keys over many programs, longer
ones to a kernel with large tiles; a mixed batch is two launches. Imports triton only when an instance is made, so that
`supports` can say that it is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.attention import AttentionBackend, AttentionSpec, CacheLayout, HeadTurn
from interlace.plugins.triton import runtime
from interlace.plugins.triton.attention_config import LayerShape, decode_lanes, power_of_two
from interlace.plugins.triton.attention_plan import Cut, cut_invariant, cut_rows
from interlace.worker.batch import DecodeBatch, ForwardBatch

if TYPE_CHECKING:
    from interlace.plugins.triton.attention import DecodeLaunch
    from interlace.plugins.triton.attention_decode import Pieces
    from interlace.plugins.triton.kv_cache import CacheView

MAX_HEAD_SIZE = 256
_MIN_BLOCK_SIZE = 16
_MAX_GROUP = 128
_SCRATCH_BYTES = 256 << 20
"""Of partial sums, for one launch that is not captured in a graph."""
_INVARIANT_ROWS = 16


class Metadata(NamedTuple):
    """One step of one KV group."""

    slots: torch.Tensor  # [tokens] int64 to write to
    tables: torch.Tensor  # [rows, max_blocks] int32
    decode: tuple[DecodeLaunch, ...]
    prefill: Pieces | None


class LaunchOptions(BaseModel):
    """How kernels are launched; shared by the backends made of them."""

    model_config = ConfigDict(extra="forbid")

    tune: bool = Field(
        default=False,
        description="Measure at start which tiles are best for this model on this GPU, unless that is known from "
        "before (seconds to a minute). Without it the first start uses figures that suit a large GPU.",
    )
    tuning_dir: str = Field(
        default="~/.cache/interlace/triton", description="Where what `tune` found is kept, and looked for."
    )
    fuse: bool = Field(
        default=True,
        description="Norm and turn heads and write keys and values in one launch, instead of leaving norms and "
        "rotary embedding to the kernels.",
    )


class TritonAttention(AttentionBackend):
    """A row's result has the same bits whatever else is in the batch. A prompt's may depend on how its prefill is cut,
    since the two kernels round differently; `triton_invariant` is without that, and slower at prefill."""

    class Options(LaunchOptions):
        """Options of the Triton attention."""

        kv_dtype: Literal["auto", "fp8"] = Field(
            default="auto",
            description="How keys and values are kept: `auto`: in the compute type; `fp8`: in 8 bits (e4m3), with a "
            "scale per token and head, which halves a 16-bit cache and rounds it.",
        )

    graph_support = "decode"
    _is_invariant: ClassVar[bool] = False

    def __init__(self, options: BaseModel, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> None:
        super().__init__(options, spec, block_size, dtype, device)
        from interlace.plugins.triton.attention import Layer
        from interlace.plugins.triton.tuning import choose_configs

        self.turns_heads = self.options.fuse
        self._is_fp8 = getattr(options, "kv_dtype", "auto") == "fp8"
        if self._is_fp8 and (reason := runtime.fp8_refusal(device)) is not None:
            raise ValueError(f"kv_dtype = 'fp8' is not possible: it {reason}")
        itemsize = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
        window = spec.window if spec.kind == "window" else 0
        group = spec.num_heads // spec.num_kv_heads
        self.shape = LayerShape(
            spec.num_kv_heads, group, spec.head_size, block_size, itemsize, self._is_fp8, window, spec.softcap > 0.0
        )
        configs = choose_configs(self.shape, dtype, device, self.options.tuning_dir, self.options.tune)
        self.layer = Layer(self.shape, spec.softmax_scale, spec.softcap, *configs)
        self._multiprocessors = runtime.multiprocessors(device)
        self._invariant_count = power_of_two(max(1, _INVARIANT_ROWS // group) + 1) // 2

    @classmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        return runtime.refusal(device) or runtime.dtype_refusal(dtype, device) or layer_refusal(spec, block_size)

    @classmethod
    def auto_refusal(cls, device: str) -> str | None:
        return runtime.auto_refusal(device)

    def cache_layout(self, num_blocks: int) -> CacheLayout:
        """[blocks, 2 (keys, values), KV heads, block_size, head_size]; with 8 bits [blocks, bytes], see
        plugins/triton/kv_cache.py."""
        spec = self.spec
        if self._is_fp8:
            nbytes = 2 * spec.num_kv_heads * self.block_size * (spec.head_size + 4)
            return CacheLayout((num_blocks, nbytes), "int8", num_blocks * nbytes)
        shape = (num_blocks, 2, spec.num_kv_heads, self.block_size, spec.head_size)
        return CacheLayout(shape, self.dtype, torch.Size(shape).numel() * self.shape.itemsize)

    def prepare(self, batch: ForwardBatch, group: int) -> Metadata:
        query_lens, context_lens = batch.query_lens_array, batch.context_lens_array
        if self._is_invariant:
            most = max(1, _SCRATCH_BYTES // self._scratch_bytes(batch.max_seq_len, self._invariant_count))
            decode, prefill = list(cut_invariant(query_lens, context_lens, self._invariant_count, most)), None
        else:
            count = self.shape.prefill_count(self.layer.prefill)
            decode, prefill = cut_rows(query_lens, context_lens, self.shape.max_verify, count)
        return self._metadata(batch, group, decode, prefill)

    def prepare_decode(self, batch: DecodeBatch, group: int) -> Metadata:
        from interlace.plugins.triton.attention_decode import Pieces

        rows = torch.arange(batch.num_rows, dtype=torch.int32, device=batch.seq_lens.device)
        pieces = Pieces(rows, rows, torch.ones_like(rows), batch.seq_lens)
        launch = self._decode_launch(pieces, 1, batch.max_seq_len)
        return Metadata(batch.slot_mappings[group], batch.block_tables[group], (launch,), None)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        from interlace.plugins.triton.kv_cache import write_kv

        view = self._view(cache)
        write_kv(key, value, view, metadata.slots, self.block_size)
        return self._attend(query, view, metadata)

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
        from interlace.plugins.triton.rope import CacheSlots, rope

        view = self._view(cache)
        slots = CacheSlots(view, metadata.slots, self.block_size)
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        query, _ = rope(query, key, positions, turn.cos_sin, turn.norms, value, slots)
        return self._attend(query, view, metadata)

    def _view(self, cache: torch.Tensor) -> CacheView:
        from interlace.plugins.triton.kv_cache import view_cache

        shape = self.shape
        return view_cache(cache, shape.num_kv_heads, shape.block_size, shape.head_size, shape.is_fp8)

    def _attend(self, query: torch.Tensor, view: CacheView, metadata: Metadata) -> torch.Tensor:
        """Over what the cache holds by now."""
        from interlace.plugins.triton import attention

        query = query if query.stride(2) == 1 else query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for work in metadata.decode:
            attention.decode(self.layer, query, view, metadata.tables, work, out)
        if metadata.prefill is not None:
            attention.prefill(self.layer, query, view, metadata.tables, metadata.prefill, out)
        return out

    # ── Once per step ───────────────────────────────────────────────────────────────────────────────────────────

    def _metadata(self, batch: ForwardBatch, group: int, decode: list[Cut], prefill: Cut | None) -> Metadata:
        """One transfer takes all pieces to the device. `prefill` None: others take the rows that are left."""
        from interlace.plugins.triton.attention_decode import Pieces

        cuts = decode if prefill is None else [*decode, prefill]
        slots, tables = batch.slot_mappings[group], batch.block_tables[group]
        if not cuts:
            return Metadata(slots, tables, (), None)
        sizes = [cut.array.shape[1] for cut in cuts]
        on_device = runtime.to_device(np.concatenate([cut.array for cut in cuts], axis=1), self.device)
        parts = [Pieces(*part.unbind(0)) for part in on_device.split(sizes, dim=1)]  # type: ignore[no-untyped-call]
        launches = tuple(
            self._decode_launch(pieces, cut.most, cut.max_seq_len) for pieces, cut in zip(parts, decode, strict=False)
        )
        return Metadata(slots, tables, launches, parts[-1] if prefill is not None and sizes[-1] else None)

    def _decode_launch(self, pieces: Pieces, count: int, max_seq_len: int) -> DecodeLaunch:
        from interlace.plugins.triton.attention import DecodeLaunch

        slots = self.shape.split_slots(max_seq_len, count)
        lanes = decode_lanes(len(pieces.starts), self.shape.num_kv_heads, slots, self._multiprocessors)
        return DecodeLaunch(pieces, count, slots, lanes, self._invariant_count if self._is_invariant else 1)

    def _scratch_bytes(self, max_seq_len: int, count: int) -> int:
        """Of one piece's partial sums."""
        heads = self.shape.num_kv_heads * self.shape.group
        return max(1, self.shape.split_slots(max_seq_len, count)) * count * heads * (self.shape.head_size + 2) * 4


class InvariantTritonAttention(TritonAttention):
    """Every row, of a prompt or not, through the kernel that decodes, in pieces that follow from positions alone: the
    same bits alone and in company, and however a prefill is cut."""

    batch_invariant = True
    _is_invariant = True


def layer_refusal(spec: AttentionSpec, block_size: int) -> str | None:
    """None if the kernels know such layers, else the reason against, as a clause."""
    if spec.kind not in ("full", "window"):
        return f"knows layers of kind full and window, not '{spec.kind}'"
    if spec.kind == "window" and spec.window < 1:
        return f"a window of {spec.window} tokens is empty"
    if not 1 <= spec.head_size <= MAX_HEAD_SIZE:
        return f"head sizes go up to {MAX_HEAD_SIZE}, not {spec.head_size}"
    if spec.num_heads // spec.num_kv_heads > _MAX_GROUP:
        return f"up to {_MAX_GROUP} query heads may share a KV head, not {spec.num_heads // spec.num_kv_heads}"
    if block_size < _MIN_BLOCK_SIZE or block_size & (block_size - 1):
        return f"block sizes are powers of two from {_MIN_BLOCK_SIZE} on, not {block_size}"
    return None
