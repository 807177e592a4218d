"""`Pager`: block tables for tests that run models or attention without an engine."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from interlace.kv.specs import NULL_BLOCK, blocks_for
from interlace.worker.batch import ForwardBatch


class Pager:
    """Keeps named sequences in blocks and makes the `ForwardBatch` of a step.

    `windows` has one entry per KV group, 0 for full attention. Blocks are handed out in random order, and blocks that
    fell out of a group's window are taken away, so that reading what must not be read shows.
    """

    def __init__(
        self, windows: Sequence[int], block_size: int, num_blocks: int, max_len: int, device: str = "cpu"
    ) -> None:
        self._windows = windows
        self._block_size = block_size
        self._table_width = blocks_for(max_len, block_size)
        self._device = device
        self._free = [block for block in range(num_blocks) if block != NULL_BLOCK]
        random.Random(0).shuffle(self._free)
        self._freed: list[int] = []
        self._lengths: dict[str, int] = {}
        self._tables: dict[str, list[list[int]]] = {}  # sequence → per group its block ids in order

    def next_batch(self, tokens: Mapping[str, Sequence[int]]) -> ForwardBatch:
        """The step that runs the next tokens of these sequences; an unknown name starts a new one."""
        names = list(tokens)
        for name in names:
            self._lengths.setdefault(name, 0)
            self._tables.setdefault(name, [[] for _ in self._windows])
            for table, window in zip(self._tables[name], self._windows, strict=True):
                self._update(table, window, self._lengths[name], len(tokens[name]))
        groups = range(len(self._windows))
        positions = {name: range(self._lengths[name], self._lengths[name] + len(tokens[name])) for name in names}
        batch = ForwardBatch(
            token_ids=self._tensor([token for name in names for token in tokens[name]]),
            positions=self._tensor([position for name in names for position in positions[name]]),
            query_lens=[len(tokens[name]) for name in names],
            context_lens=[self._lengths[name] for name in names],
            block_tables=[self._block_table(names, group) for group in groups],
            slot_mappings=[self._slot_mapping(positions, group) for group in groups],
        )
        for name in names:
            self._lengths[name] += len(tokens[name])
        return batch

    def free(self, name: str) -> None:
        """Forget a sequence and take its blocks back."""
        for table in self._tables.pop(name):
            self._release([block for block in table if block != NULL_BLOCK])
        del self._lengths[name]

    def take_freed(self) -> list[int]:
        """Blocks that were taken back since the last call and that nobody holds now."""
        held = {block for tables in self._tables.values() for table in tables for block in table}
        freed = [block for block in self._freed if block not in held]
        self._freed = []
        return freed

    def rename_blocks(self, names: Mapping[int, int]) -> None:
        """The content of every block `old` is now in block `names[old]`."""
        for tables in self._tables.values():
            for table in tables:
                table[:] = [names.get(block, block) for block in table]
        self._free = [names[block] for block in self._free]
        self._freed = [names[block] for block in self._freed]

    def _release(self, blocks: list[int]) -> None:
        self._free += blocks
        self._freed += blocks

    def _update(self, table: list[int], window: int, context: int, new: int) -> None:
        first_seen = max(0, context - window + 1) if window else 0
        for index in range(min(first_seen // self._block_size, len(table))):
            if table[index] != NULL_BLOCK:
                self._release([table[index]])
                table[index] = NULL_BLOCK
        while len(table) < blocks_for(context + new, self._block_size):
            table.append(self._free.pop())

    def _block_table(self, names: list[str], group: int) -> torch.Tensor:
        rows = torch.full((len(names), self._table_width), NULL_BLOCK, dtype=torch.int32)
        for row, name in enumerate(names):
            table = self._tables[name][group]
            rows[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
        return rows.to(self._device)

    def _slot_mapping(self, positions: Mapping[str, range], group: int) -> torch.Tensor:
        size = self._block_size
        return self._tensor(
            [
                self._tables[name][group][position // size] * size + position % size
                for name in positions
                for position in positions[name]
            ]
        )

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
