"""Attention as its definition says, in float64; and `ReferenceAttention`, a paged backend made of it, for tests."""

from __future__ import annotations

from typing import Any

import torch

from interlace.interfaces.attention import AttentionBackend, AttentionSpec, CacheLayout
from interlace.worker.batch import DecodeBatch, ForwardBatch


def dense_attention(spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: `query` [queries, heads, head_size] are the last of the [tokens, kv_heads,
    head_size] of a sequence. Returns [queries, heads, head_size]."""
    repeats = spec.num_heads // spec.num_kv_heads
    wide_query = query.double().transpose(0, 1)  # [heads, queries, head_size]
    wide_key, wide_value = (x.double().repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
    scores = wide_query @ wide_key.transpose(1, 2) * spec.softmax_scale
    if spec.softcap:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    other = torch.arange(len(key), device=key.device)
    own = other[len(key) - len(query) :, None]
    seen = other <= own
    if spec.kind == "window":
        seen &= other > own - spec.window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide_value).transpose(0, 1)


class ReferenceAttention(AttentionBackend):
    """Row by row, in float64. Slow and plain: models are tested with it, so that no real backend is to blame.

    Cache layout: [blocks, block_size, 2 (key, value), kv_heads, head_size]. Its decode steps can stand in a graph of
    the fake device, which calls again what it recorded."""

    graph_support = "decode"

    @classmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        if spec.kind not in ("full", "window"):
            return f"knows layers of kind full and window, not '{spec.kind}'"
        if spec.kind == "window" and spec.window < 1:
            return f"a window of {spec.window} tokens is empty"
        if dtype not in ("float64", "float32", "bfloat16", "float16"):
            return f"runs in plain floating types, not in {dtype}"
        return None

    def cache_layout(self, num_blocks: int) -> CacheLayout:
        shape = (num_blocks, self.block_size, 2, self.spec.num_kv_heads, self.spec.head_size)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return CacheLayout(shape, self.dtype, torch.Size(shape).numel() * dtype.itemsize)

    def prepare(self, batch: ForwardBatch, group: int) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
        """The slots to write; for each row its queries, and the slots of the tokens that the first of them sees on."""
        rows = []
        for row, table in enumerate(batch.block_tables[group]):
            context = batch.context_lens[row]
            first = max(0, context - self.spec.window + 1) if self.spec.kind == "window" else 0
            seen = torch.arange(first, batch.seq_lens[row], device=table.device)
            slots = table[seen // self.block_size].long() * self.block_size + seen % self.block_size
            rows.append((slice(batch.query_start[row], batch.query_start[row + 1]), slots))
        return batch.slot_mappings[group], rows

    def graph_refusal(self) -> str | None:
        return None if self.device == "cpu" else f"it reads lengths on the host, which a graph on {self.device} cannot"

    def prepare_decode(self, batch: DecodeBatch, group: int) -> tuple[DecodeBatch, int]:
        """The buffers themselves: they are read in `forward`."""
        return batch, group

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        if isinstance(metadata[0], DecodeBatch):
            metadata = self.prepare(_as_forward_batch(metadata[0]), metadata[1])
        write_slots, rows = metadata
        slots = cache.flatten(0, 1)  # [slots, 2, kv_heads, head_size]
        slots[write_slots] = torch.stack((key, value), dim=1)
        out = torch.empty_like(query)
        for queries, seen in rows:
            out[queries] = dense_attention(self.spec, query[queries], *slots[seen].unbind(1)).to(query.dtype)
        return out


def _as_forward_batch(batch: DecodeBatch) -> ForwardBatch:
    positions = batch.positions
    return ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        query_lens=[1] * batch.num_rows,
        context_lens=(batch.seq_lens - 1).tolist(),
        block_tables=batch.block_tables,
        slot_mappings=batch.slot_mappings,
    )
