"""`DeviceBatch`: the persistent batch of a device that runs behind the host.

Lengths, block tables and how requests sample are known on the host at any time, whatever is in flight. Of the tokens
only those of steps whose results are in are known; the others the device feeds to itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from interlace.kv.specs import KVCacheConfig
from interlace.messages import Admission, StepPlan
from interlace.sampling.device import SamplingMode
from interlace.worker.persistent_batch import PersistentBatch

Array = npt.NDArray[Any]

FED_BACK = -1
"""In place of a token id: the newest token sampled for its slot, which only the device knows yet."""


class StepInputs(NamedTuple):
    """One step as the host knows it, in arrays that nobody changes afterwards."""

    query_lens: Array  # [rows]
    context_lens: Array  # [rows]
    slots: Array  # [rows]
    token_slots: Array  # [tokens] whose token it is
    token_ids: Array  # [tokens], FED_BACK where not known
    positions: Array  # [tokens]
    slot_mappings: list[Array]  # per KV group: [tokens]
    rows: list[int] | range  # rows of the plan that sample
    outputs: Array  # [those rows] place of their last token
    is_decode: bool
    """Whether every row computes one token and samples after it."""
    longest: int
    """Tokens in the cache of the longest row after this step."""

    @property
    def out_slots(self) -> Array:
        """[rows that sample] their slots."""
        return self.slots if len(self.rows) == len(self.slots) else self.slots[list(self.rows)]


class DeviceBatch(PersistentBatch):
    """`flatten` in place of `build`; the tensors are made on the device."""

    def __init__(self, max_num_seqs: int, max_model_len: int, kv: KVCacheConfig) -> None:
        super().__init__(max_num_seqs, max_model_len, kv, torch.device("cpu"))
        self.max_num_seqs = max_num_seqs
        self.max_blocks = -(-max_model_len // kv.block_size)
        self.block_size = kv.block_size
        self.num_groups = len(kv.groups)
        self._temperature = np.zeros(max_num_seqs, dtype=np.float32)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int32)
        self._top_p = np.ones(max_num_seqs, dtype=np.float32)
        self._min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self._seed = np.zeros(max_num_seqs, dtype=np.int64)
        self._sample_index = np.zeros(max_num_seqs, dtype=np.int64)
        self._mode = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1, dtype=np.int32)
        self._news: dict[str, Array] = {}

    def admit(self, admission: Admission, step_id: int) -> None:
        super().admit(admission, step_id)
        slot, params, seed = admission.slot, admission.params, admission.seed & (2**64 - 1)
        self._temperature[slot] = params.temperature
        self._top_k[slot] = min(max(params.top_k, 0), 2**31 - 1)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = seed - 2**64 if seed >= 2**63 else seed
        self._sample_index[slot] = admission.sample_index
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        cut = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        drawn = SamplingMode.TRUNCATED if cut else SamplingMode.RANDOM
        self._mode[slot] = SamplingMode.GREEDY if params.greedy else drawn

    def append_blocks(self, plan: StepPlan) -> None:
        self._news = self._news_of(plan) if any(delta.slots for delta in plan.blocks) else {}
        super().append_blocks(plan)

    def take_news(self) -> dict[str, Array]:
        """What the last `append_blocks` added, for the tables on the device: per KV group `index.0`, … (places in the
        flattened table [slots, max_blocks]) and `block.0`, …. Empty if that was nothing."""
        news, self._news = self._news, {}
        return news

    def _news_of(self, plan: StepPlan) -> dict[str, Array]:
        news: dict[str, Array] = {}
        for group, delta in enumerate(plan.blocks):
            counts = np.array(delta.counts, dtype=np.int64)
            slots = np.array(delta.slots, dtype=np.int64)
            starts = slots * self.max_blocks + self._num_blocks[group][slots]
            before = counts.cumsum() - counts
            within = np.arange(len(delta.block_ids)) - np.repeat(before, counts)
            news[f"index.{group}"] = np.repeat(starts, counts) + within
            news[f"block.{group}"] = np.array(delta.block_ids, dtype=np.int32)
        return news

    def flatten(self, plan: StepPlan) -> StepInputs:
        """The plan's rows, back to back."""
        slots, num_rows = self._index(plan.slots), len(plan.slots)
        context_lens = self.num_computed[slots]
        samples_all = all(plan.sample)
        rows = range(num_rows) if samples_all else [row for row, wanted in enumerate(plan.sample) if wanted]
        if plan.num_tokens.count(1) == num_rows:
            query_lens = self._ones[:num_rows]
            positions, token_slots, longest = context_lens, slots, int(context_lens.max()) + 1
            outputs = np.array(rows, dtype=np.int64)
        else:
            query_lens = np.array(plan.num_tokens, dtype=np.int64)
            ends = np.cumsum(query_lens)
            row_of = np.repeat(np.arange(num_rows), query_lens)  # [tokens]
            positions = np.arange(ends[-1]) - np.repeat(ends - query_lens, query_lens) + context_lens[row_of]
            token_slots, longest = slots[row_of], int((context_lens + query_lens).max())
            outputs = ends[list(rows)] - 1
        block_of = positions // self.block_size
        offset = positions - block_of * self.block_size
        known = positions < self.num_tokens[token_slots]
        return StepInputs(
            query_lens=query_lens,
            context_lens=context_lens,
            slots=slots,
            token_slots=token_slots,
            token_ids=np.where(known, self.token_ids[token_slots, positions], FED_BACK),
            positions=positions,
            slot_mappings=[
                table[token_slots, block_of].astype(np.int64) * self.block_size + offset for table in self._tables
            ],
            rows=rows,
            outputs=outputs,
            is_decode=samples_all and len(positions) == num_rows,
            longest=longest,
        )

    def sampling_columns(self, inputs: StepInputs) -> dict[str, Array]:
        """How the rows that sample do so, under the names of `SamplingColumns`; and `num_logprobs`, how many log
        probabilities of other tokens they report, -1 for none, not even of their own."""
        slots, rows = inputs.out_slots, slice(None) if len(inputs.rows) == len(inputs.slots) else list(inputs.rows)
        ends = inputs.context_lens[rows] + inputs.query_lens[rows]
        return {
            "temperature": self._temperature[slots],
            "top_k": self._top_k[slots],
            "top_p": self._top_p[slots],
            "min_p": self._min_p[slots],
            "seed": self._seed[slots],
            "sample_index": self._sample_index[slots],
            "position": ends - self.num_prompt_tokens[slots],
            "num_logprobs": self._num_logprobs[slots],
        }

    def sampling_mode(self, inputs: StepInputs) -> SamplingMode:
        """The least that serves all rows of the step."""
        return SamplingMode(int(self._mode[inputs.out_slots].max(initial=0)))
