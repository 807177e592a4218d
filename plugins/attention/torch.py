"""Attention `torch`: a readable reference for the paged layout, on any device torch knows.

Rows with one query token (decode) are gathered into padded batches; longer rows (prefill) run one by one, in blocks
of queries that bound the memory of masks and scores. Nothing unwritten is ever read: where a gather needs padding
it reads the row's own newest token, and the mask hides it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from interlace.interfaces.attention import AttentionBackend, AttentionSpec, CacheLayout
from interlace.worker.batch import ForwardBatch

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_GATHERED = 16384  # cached tokens that a batch of decode rows gathers at once; bounds the scratch memory
_MAX_QUERIES = 512  # queries of one prefill row that attend at once


class DecodeChunk(NamedTuple):
    """Rows with one query token each, of similar length."""

    tokens: torch.Tensor  # [rows] their places in the batch
    slots: torch.Tensor  # [rows, length] cache slots of the tokens they see, padded with their newest one
    mask: torch.Tensor | None  # [rows, 1, 1, length] added to the scores: 0 or -inf; None: all seen


class PrefillChunk(NamedTuple):
    """Some query tokens of one row. They see cached tokens and, before and among themselves, tokens of this step."""

    queries: slice  # places in the batch
    fresh: slice  # places in the batch of the tokens of this step they see
    cached: torch.Tensor | None  # [length] cache slots of the earlier tokens they see
    mask: torch.Tensor | None  # [queries, cached + fresh] added to the scores: 0 or -inf; None: causal


class Metadata(NamedTuple):
    """One step of one KV group."""

    write_slots: torch.Tensor  # [tokens] int64
    decode: list[DecodeChunk]
    prefill: list[PrefillChunk]


class TorchAttention(AttentionBackend):
    """Cache layout: [blocks, block_size, 2 (key, value), kv_heads, head_size]; a slot's key and value lie together,
    so one gather fetches both."""

    @classmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        if spec.kind not in ("full", "window"):
            return f"knows layers of kind full and window, not '{spec.kind}'"
        if spec.kind == "window" and spec.window < 1:
            return f"a window of {spec.window} tokens is empty"
        if dtype not in _DTYPES:
            return f"runs in {', '.join(_DTYPES)}, not in {dtype}"
        return None

    def cache_layout(self, num_blocks: int) -> CacheLayout:
        shape = (num_blocks, self.block_size, 2, self.spec.num_kv_heads, self.spec.head_size)
        return CacheLayout(shape, self.dtype, torch.Size(shape).numel() * self._torch_dtype.itemsize)

    def prepare(self, batch: ForwardBatch, group: int) -> Metadata:
        table = batch.block_tables[group]
        decode_rows = [row for row, length in enumerate(batch.query_lens) if length == 1]
        decode_rows.sort(key=batch.seq_lens.__getitem__, reverse=True)
        decode = [self._decode_chunk(batch, table, rows) for rows in self._cut(batch.seq_lens, decode_rows)]
        prefill: list[PrefillChunk] = []
        for row, length in enumerate(batch.query_lens):
            if length > 1:
                prefill += self._prefill_chunks(batch, table[row], row)
        return Metadata(batch.slot_mappings[group], decode, prefill)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        slots = cache.flatten(0, 1)  # [slots, 2, kv_heads, head_size]
        slots.index_copy_(0, metadata.write_slots, torch.stack((key, value), dim=1))
        out = torch.empty_like(query)
        for chunk in metadata.decode:
            out[chunk.tokens] = self._decode(query[chunk.tokens], slots, chunk)
        for chunk in metadata.prefill:
            out[chunk.queries] = self._prefill(query, key, value, slots, chunk)
        return out

    # ── Once per step ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def _first_seen(self, position: int) -> int:
        """First position that the token at `position` sees."""
        return max(0, position - self.spec.window + 1) if self.spec.kind == "window" else 0

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        """0 where `seen` is true, else -inf, in the compute type: what attention kernels add fastest."""
        return torch.zeros(seen.shape, dtype=self._torch_dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    def _cut(self, seq_lens: list[int], rows: list[int]) -> list[list[int]]:
        """Cut rows, longest first, into chunks of bounded size in which no row is padded to more than double."""
        chunks: list[list[int]] = []
        longest = 0
        for row in rows:
            length = seq_lens[row] - self._first_seen(seq_lens[row] - 1)
            if chunks and 2 * length >= longest and (len(chunks[-1]) + 1) * longest <= _MAX_GATHERED:
                chunks[-1].append(row)
            else:
                chunks.append([row])
                longest = length
        return chunks

    def _slots(self, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Cache slots of `positions` [..., n] under block tables [..., blocks]."""
        blocks = table.gather(-1, positions // self.block_size).long()
        return blocks * self.block_size + positions % self.block_size

    def _decode_chunk(self, batch: ForwardBatch, table: torch.Tensor, rows: list[int]) -> DecodeChunk:
        last_seen = [batch.seq_lens[row] - 1 for row in rows]
        first_seen = [self._first_seen(position) for position in last_seen]
        lengths = [last - first + 1 for first, last in zip(first_seen, last_seen, strict=True)]
        first = torch.tensor(first_seen, device=table.device)[:, None]
        last = torch.tensor(last_seen, device=table.device)[:, None]
        wanted = first + torch.arange(max(lengths), device=table.device)  # [rows, length]
        slots = self._slots(table[rows], torch.minimum(wanted, last))
        mask = None if min(lengths) == max(lengths) else self._additive(wanted <= last)[:, None, None]
        tokens = torch.tensor([batch.query_start[row] for row in rows], device=table.device)
        return DecodeChunk(tokens, slots, mask)

    def _prefill_chunks(self, batch: ForwardBatch, table: torch.Tensor, row: int) -> list[PrefillChunk]:
        device = table.device
        start, stop, context = batch.query_start[row], batch.query_start[row + 1], batch.context_lens[row]
        whole = slice(start, stop)
        is_plain = context == 0 and self._first_seen(stop - start - 1) == 0
        if is_plain and not self.spec.softcap:
            return [PrefillChunk(whole, whole, None, None)]
        chunks = []
        for first in range(start, stop, _MAX_QUERIES):
            after = min(first + _MAX_QUERIES, stop)
            position = context - start  # of a token in its sequence, less its place in the batch
            begin, end = self._first_seen(first + position), after + position  # positions seen
            cached = self._slots(table, torch.arange(begin, context, device=device)) if begin < context else None
            fresh = slice(max(begin, context) - position, after)
            seen = torch.arange(begin, end, device=device)  # [length]
            own = torch.arange(first + position, end, device=device)[:, None]  # [queries, 1]
            is_seen = seen <= own
            if self.spec.kind == "window":
                is_seen &= seen > own - self.spec.window
            chunks.append(PrefillChunk(slice(first, after), fresh, cached, self._additive(is_seen)))
        return chunks

    # ── Once per layer ──────────────────────────────────────────────────────────────────────────────────────────

    def _decode(self, query: torch.Tensor, slots: torch.Tensor, chunk: DecodeChunk) -> torch.Tensor:
        """query [rows, heads, head_size] -> the same shape."""
        rows, length = chunk.slots.shape
        seen = slots.index_select(0, chunk.slots.flatten()).view(rows, length, *slots.shape[1:])
        key, value = seen.permute(2, 0, 3, 1, 4)  # each [rows, kv_heads, length, head_size]
        # The heads that share a KV head stand where queries do: [rows, kv_heads, heads / kv_heads, head_size].
        grouped = query.view(rows, self.spec.num_kv_heads, -1, self.spec.head_size)
        return self._attend(grouped, key, value, chunk.mask, causal=False).flatten(1, 2)

    def _prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, chunk: PrefillChunk
    ) -> torch.Tensor:
        """All tokens of the step -> [queries, heads, head_size] of this chunk."""
        key, value = key[chunk.fresh], value[chunk.fresh]  # [fresh, kv_heads, head_size]
        if chunk.cached is not None:
            cached_key, cached_value = slots.index_select(0, chunk.cached).unbind(1)
            key, value = torch.cat((cached_key, key)), torch.cat((cached_value, value))
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query[chunk.queries], key, value))
        return self._attend(query, key, value, chunk.mask, causal=chunk.mask is None).squeeze(0).transpose(0, 1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """query [batch, heads, queries, head_size] over key, value [batch, kv_heads, length, head_size]."""
        scale, softcap = self.spec.softmax_scale, self.spec.softcap
        if not softcap:
            return scaled_dot_product_attention(
                query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
            )
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = (query @ key.transpose(-1, -2)).float() * scale  # [batch, heads, queries, length]
        scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1).to(value.dtype) @ value
