"""`ForwardBatch`: the only type with tensors. Made by the worker once per step; read by attention backends."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.integer[Any]]


class ForwardBatch:
    """One step's flattened batch: rows (sequences) of different lengths, back to back, without padding.

    What backends plan with on the host comes in two forms, plain lists and numpy arrays (`..._array`); lengths come as
    tensors on the device (`..._tensor`), too. Each is made when it is first read: a step that needs no form pays for
    none.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        query_lens: list[int] | IntArray,
        context_lens: list[int] | IntArray,
        block_tables: list[torch.Tensor],
        slot_mappings: list[torch.Tensor],
        seq_lens_tensor: torch.Tensor | None = None,
        query_start_tensor: torch.Tensor | None = None,
    ) -> None:
        """The last two save making them, where they are on the device already."""
        self.token_ids = token_ids  # [tokens] int64
        self.positions = positions  # [tokens] int64, position in its own sequence
        self.query_lens_array = np.asarray(query_lens, dtype=np.int64)  # CPU; [rows], tokens of this step
        self.context_lens_array = np.asarray(context_lens, dtype=np.int64)  # CPU; [rows], tokens already in the cache
        self.block_tables = block_tables  # per KV group: [rows, max_blocks] int32, NULL_BLOCK where not held
        self.slot_mappings = slot_mappings  # per KV group: [tokens] int64 = block id * block_size + offset
        self.num_rows = len(query_lens)
        self.num_tokens = token_ids.shape[0]
        if seq_lens_tensor is not None:
            self.seq_lens_tensor = seq_lens_tensor
        if query_start_tensor is not None:
            self.query_start_tensor = query_start_tensor

    @cached_property
    def query_start_array(self) -> IntArray:
        """[rows + 1] offsets of the rows in the token dimension."""
        starts = np.zeros(self.num_rows + 1, dtype=np.int64)
        self.query_lens_array.cumsum(out=starts[1:])
        return starts

    @cached_property
    def query_lens(self) -> list[int]:
        """Tokens of this step per row."""
        return _as_list(self.query_lens_array)

    @cached_property
    def context_lens(self) -> list[int]:
        """Tokens already in the cache per row."""
        return _as_list(self.context_lens_array)

    @cached_property
    def seq_lens(self) -> list[int]:
        """Tokens in the cache after this step per row."""
        return _as_list(self.context_lens_array + self.query_lens_array)

    @cached_property
    def query_start(self) -> list[int]:
        """`query_start_array` as a list."""
        return _as_list(self.query_start_array)

    @cached_property
    def seq_lens_tensor(self) -> torch.Tensor:
        """[rows] int32 on the device of the batch: tokens in the cache after this step."""
        return self._on_device(self.context_lens_array + self.query_lens_array)

    @cached_property
    def query_start_tensor(self) -> torch.Tensor:
        """[rows + 1] int32 on the device of the batch: offsets of the rows in the token dimension."""
        return self._on_device(self.query_start_array)

    def _on_device(self, array: IntArray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self.positions.device, non_blocking=True)

    @cached_property
    def max_query_len(self) -> int:
        """The most tokens of this step in a row; 0 without rows."""
        return max(self.query_lens, default=0)

    @cached_property
    def max_seq_len(self) -> int:
        """The longest sequence after this step; 0 without rows."""
        return max(self.seq_lens, default=0)


class DecodeBatch(NamedTuple):
    """Rows of one token each, in buffers on the device that stay where they are while their values change from step to
    step: what a device graph is captured over.

    A step with fewer rows fills the rest with padding: a sequence of one token, which lies in the null block.
    """

    positions: torch.Tensor  # [rows] int64, position in its own sequence; 0 in padding
    seq_lens: torch.Tensor  # [rows] int32, tokens in the cache after this step = position + 1
    block_tables: list[torch.Tensor]  # per KV group: [rows, max_blocks] int32, NULL_BLOCK where not held
    slot_mappings: list[torch.Tensor]  # per KV group: [rows] int64 = block id * block_size + offset; 0 in padding
    max_seq_len: int  # no step this batch is used for has a longer sequence

    @property
    def num_rows(self) -> int:
        """Rows, padding included."""
        return self.positions.shape[0]


def _as_list(array: IntArray) -> list[int]:
    values: list[int] = array.tolist()
    return values
