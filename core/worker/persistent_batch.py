"""`PersistentBatch`: what a worker keeps per slot between steps, so that plans only carry what changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from interlace.kv.specs import NULL_BLOCK, KVCacheConfig
from interlace.messages import Admission, SampledTokens, StepPlan
from interlace.worker.batch import ForwardBatch


class PersistentBatch:
    """Token ids, computed counts and block tables of all slots, as arrays indexed by slot.

    The batch of a step is gathered from them with a handful of array operations, however many rows it has.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, kv: KVCacheConfig, device: torch.device) -> None:
        max_blocks = -(-max_model_len // kv.block_size)
        self.token_ids = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_seqs, dtype=np.int64)  # known tokens per slot
        self.num_computed = np.zeros(max_num_seqs, dtype=np.int64)  # of those, with KV in the cache
        self.num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._admitted_in = np.full(max_num_seqs, -1, dtype=np.int64)  # step that gave the slot to whom it belongs now
        self._tables = [np.full((max_num_seqs, max_blocks), NULL_BLOCK, dtype=np.int32) for _ in kv.groups]
        self._num_blocks = [np.zeros(max_num_seqs, dtype=np.int64) for _ in kv.groups]
        self._block_size = kv.block_size
        self._ones = np.ones(max_num_seqs, dtype=np.int64)
        self._slots: list[int] = []  # what `_index` was last asked for, and its answer
        self._slots_array = np.zeros(0, dtype=np.int64)
        self._device = device

    def admit(self, admission: Admission, step_id: int) -> None:
        """A request takes a slot with step `step_id`; its blocks follow in the same plan."""
        slot, count = admission.slot, len(admission.token_ids)
        self._admitted_in[slot] = step_id
        self.token_ids[slot, :count] = admission.token_ids
        self.num_tokens[slot] = count
        self.num_computed[slot] = admission.num_cached_tokens
        self.num_prompt_tokens[slot] = admission.num_prompt_tokens
        for lengths in self._num_blocks:
            lengths[slot] = 0

    def append_blocks(self, plan: StepPlan) -> None:
        """Extend block tables by the plan's new entries."""
        for table, lengths, delta in zip(self._tables, self._num_blocks, plan.blocks, strict=True):
            start = 0
            for slot, count in zip(delta.slots, delta.counts, strict=True):
                at = lengths[slot]
                table[slot, at : at + count] = delta.block_ids[start : start + count]
                lengths[slot] = at + count
                start += count

    def build(self, plan: StepPlan) -> ForwardBatch:
        """Flatten the plan's rows into tensors."""
        slots, num_rows = self._index(plan.slots), len(plan.slots)
        context_lens = self.num_computed[slots]
        if plan.num_tokens.count(1) == num_rows:  # everybody decodes: a token is a row
            query_lens = self._ones[:num_rows]
            positions, slot_of, longest = context_lens, slots, int(context_lens.max()) + 1
        else:
            query_lens = np.array(plan.num_tokens, dtype=np.int64)
            ends = np.cumsum(query_lens)
            row_of = np.repeat(np.arange(num_rows), query_lens)  # [tokens]
            positions = np.arange(ends[-1]) - np.repeat(ends - query_lens, query_lens) + context_lens[row_of]
            slot_of, longest = slots[row_of], int((context_lens + query_lens).max())
        block_of = positions // self._block_size
        offset = positions - block_of * self._block_size
        width = -(-longest // self._block_size)
        return ForwardBatch(
            token_ids=self._to_device(self.token_ids[slot_of, positions].astype(np.int64)),
            positions=self._to_device(positions),
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=[self._to_device(table[slots, :width]) for table in self._tables],
            slot_mappings=[
                self._to_device(table[slot_of, block_of].astype(np.int64) * self._block_size + offset)
                for table in self._tables
            ],
        )

    def advance(self, plan: StepPlan) -> None:
        """The plan's tokens are computed."""
        self.num_computed[self._index(plan.slots)] += plan.num_tokens

    def append_tokens(self, slots: list[int], token_ids: list[int]) -> None:
        """One token was sampled for each of `slots`, which are distinct; the next step computes them."""
        index = self._index(slots)
        known = self.num_tokens[index]
        self.token_ids[index, known] = token_ids
        self.num_tokens[index] = known + 1

    def hear(self, sampled: SampledTokens) -> None:
        """What another rank sampled, whenever it comes: tokens of slots that were taken since are none of theirs."""
        theirs = self._admitted_in[sampled.slots] <= sampled.step_id
        if theirs.all() and len(set(sampled.slots)) == len(sampled.slots):
            self.append_tokens(sampled.slots, sampled.token_ids)
            return
        for slot, token_id, is_theirs in zip(sampled.slots, sampled.token_ids, theirs.tolist(), strict=True):
            if is_theirs:
                self.append_tokens([slot], [token_id])

    def _index(self, slots: list[int]) -> npt.NDArray[np.int64]:
        """`slots` as an array; while the same requests decode, it is made once. Not to be changed."""
        if slots != self._slots:
            self._slots = slots
            self._slots_array = np.array(slots, dtype=np.int64)
        return self._slots_array

    def histories(self, slots: Sequence[int]) -> Histories:
        """All known tokens of each of `slots`, as views made on demand."""
        return Histories(self, slots)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class Histories:
    """`histories[i]`: all known tokens of slot `slots[i]`, prompt first, [tokens] int32; a view, not a copy."""

    def __init__(self, batch: PersistentBatch, slots: Sequence[int]) -> None:
        self._batch = batch
        self._slots = slots

    def __getitem__(self, index: int) -> np.ndarray:
        slot = self._slots[index]
        return self._batch.token_ids[slot, : self._batch.num_tokens[slot]]
