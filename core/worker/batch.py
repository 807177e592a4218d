"""`ForwardBatch`: the only type with tensors. Made by the worker once per step; read by attention backends."""

from __future__ import annotations

import torch


class ForwardBatch:
    """One step's flattened batch: rows (sequences) of different lengths, back to back, without padding.

    Fields marked CPU have a plain-list or CPU-tensor form for backends that plan on the host.
    """

    __slots__ = (
        "block_tables",
        "context_lens",
        "max_query_len",
        "max_seq_len",
        "num_rows",
        "num_tokens",
        "positions",
        "query_lens",
        "query_start",
        "seq_lens",
        "slot_mappings",
        "token_ids",
    )

    def __init__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        query_lens: list[int],
        context_lens: list[int],
        block_tables: list[torch.Tensor],
        slot_mappings: list[torch.Tensor],
    ) -> None:
        self.token_ids = token_ids  # [tokens] int64
        self.positions = positions  # [tokens] int64, position in its own sequence
        self.query_lens = query_lens  # CPU; tokens of this step per row
        self.context_lens = context_lens  # CPU; tokens already in the cache per row
        self.block_tables = block_tables  # per KV group: [rows, max_blocks] int32, NULL_BLOCK where not held
        self.slot_mappings = slot_mappings  # per KV group: [tokens] int64 = block id * block_size + offset
        self.num_rows = len(query_lens)
        self.num_tokens = int(token_ids.shape[0])
        self.seq_lens = [context + query for context, query in zip(context_lens, query_lens, strict=True)]
        starts = [0]
        for length in query_lens:
            starts.append(starts[-1] + length)
        self.query_start = starts  # CPU; [rows + 1] offsets of the rows in the token dimension
        self.max_query_len = max(query_lens, default=0)
        self.max_seq_len = max(self.seq_lens, default=0)
