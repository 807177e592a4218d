"""From the worker's batch to the native step: pointers into arrays, nothing per token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from interlace.plugins.native.library import Group, Step
from interlace.worker.batch import ForwardBatch


class StepBuffers:
    """One `Step`, filled anew for each batch; it is valid until the next `fill` and as long as the batch lives."""

    def __init__(self, max_rows: int, max_outputs: int) -> None:
        """For batches of up to `max_rows` sequences that give logits for up to `max_outputs` tokens."""
        self._query_start = np.zeros(max_rows + 1, dtype=np.int32)
        self._context_lens = np.zeros(max_rows, dtype=np.int32)
        self._outputs = np.zeros(max_outputs, dtype=np.int64)
        self._places = np.arange(max_rows, dtype=np.int64)
        self._groups = (Group * 0)()
        self._step = Step(
            query_start=self._query_start.ctypes.data,
            context_lens=self._context_lens.ctypes.data,
            outputs=self._outputs.ctypes.data,
        )

    def fill(self, batch: ForwardBatch, outputs: Sequence[int] = ()) -> Step:
        """The step of `batch`, with logits wanted at `outputs`."""
        step, rows = self._step, batch.num_rows
        self._query_start[: rows + 1] = batch.query_start_array
        self._context_lens[:rows] = batch.context_lens_array
        self._outputs[: len(outputs)] = self._places[:rows] if outputs == range(rows) else outputs
        step.num_tokens, step.num_rows, step.num_outputs = batch.num_tokens, rows, len(outputs)
        step.token_ids, step.positions = batch.token_ids.data_ptr(), batch.positions.data_ptr()
        if len(self._groups) != len(batch.block_tables):
            self._groups = (Group * len(batch.block_tables))()
            step.groups = ctypes.cast(self._groups, ctypes.POINTER(Group))
            step.num_groups = len(self._groups)
        for group, table, slots in zip(self._groups, batch.block_tables, batch.slot_mappings, strict=True):
            group.block_table, group.table_stride, group.slots = table.data_ptr(), table.stride(0), slots.data_ptr()
        return step
