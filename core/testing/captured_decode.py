"""`CapturedDecode`: decode steps of an attention backend as a device graph runs them, for the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.kv.specs import NULL_BLOCK
from interlace.worker.batch import DecodeBatch, ForwardBatch


class CapturedDecode:
    """One backend's `forward` over buffers that stay where they are, for up to `num_rows` rows.

    The metadata is made once, while the buffers hold padding. On a GPU `forward` is captured once per cache and then
    replayed; elsewhere it is called again, which shows just as well whether it reads what was there at first."""

    def __init__(
        self, backend: AttentionBackend, caches: list[torch.Tensor], num_rows: int, table_width: int, device: str
    ) -> None:
        spec = backend.spec
        self._backend = backend
        self._group = 1  # the suite's: the second of two
        self._buffers = DecodeBatch(
            positions=torch.zeros(num_rows, dtype=torch.int64, device=device),
            seq_lens=torch.ones(num_rows, dtype=torch.int32, device=device),
            block_tables=[
                torch.full((num_rows, table_width), NULL_BLOCK, dtype=torch.int32, device=device) for _ in range(2)
            ],
            slot_mappings=[torch.zeros(num_rows, dtype=torch.int64, device=device) for _ in range(2)],
            max_seq_len=table_width * backend.block_size,
        )
        dtype: torch.dtype = getattr(torch, backend.dtype)
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self._inputs = [torch.zeros(num_rows, count, spec.head_size, dtype=dtype, device=device) for count in heads]
        metadata = backend.prepare_decode(self._buffers, self._group)
        self._runs = [self._make_run(cache, metadata) for cache in caches]

    def load(self, batch: ForwardBatch) -> None:
        """Fill the buffers with a step of single tokens; what is left over is padding."""
        buffers, rows = self._buffers, batch.num_rows
        buffers.positions.zero_()[:rows] = batch.positions
        buffers.seq_lens.fill_(1)[:rows] = batch.seq_lens_tensor
        for group, table in enumerate(batch.block_tables):
            buffers.block_tables[group].fill_(NULL_BLOCK)[:rows, : table.shape[1]] = table
            buffers.slot_mappings[group].zero_()[:rows] = batch.slot_mappings[group]

    def run(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `AttentionBackend.forward` of the step that was loaded, on the cache of `layer`."""
        for buffer, given in zip(self._inputs, (query, key, value), strict=True):
            buffer.zero_()[: len(given)] = given
        return self._runs[layer]()[: len(query)].clone()

    def _make_run(self, cache: torch.Tensor, metadata: Any) -> Callable[[], torch.Tensor]:
        query, key, value = self._inputs

        def run() -> torch.Tensor:
            return self._backend.forward(query, key, value, cache, metadata)

        if cache.device.type != "cuda":
            return run
        run()  # compiles what is to be compiled; it writes the null block only
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
