"""What the sampler keeps per slot, and the built-in changes to logits that it asks for.

The changes touch the listed tokens only, by index: no mask of the vocabulary's size is made, and the rows of other
requests are not read. All of them are elementwise, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from interlace.messages import Admission
from interlace.sampling.distribution import Shape
from interlace.sampling.params import SamplingParams

TokenArray = npt.NDArray[np.integer[Any]]


class Histories(Protocol):
    """Row → all tokens known before the position to sample, prompt first: a list of arrays, or made when asked."""

    def __getitem__(self, row: int, /) -> npt.NDArray[np.int32]: ...


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """How the request in one slot samples; prepared once, when it takes the slot."""

    params: SamplingParams
    seed: int
    sample_index: int
    num_prompt_tokens: int
    shape: Shape
    bias_ids: TokenArray
    bias_values: npt.NDArray[np.float32]
    allowed_ids: TokenArray | None
    banned_ids: TokenArray
    """Bad words of one token."""
    banned_sequences: tuple[tuple[list[int], int], ...]
    """Longer bad words: what comes before the last token, and the last token."""
    stop_ids: TokenArray
    """Excluded until `min_tokens` tokens have been generated; empty when `min_tokens` is 0."""
    prompt_ids: TokenArray
    """Distinct tokens of the prompt; empty without a repetition penalty."""

    @classmethod
    def from_admission(cls, admission: Admission, vocab_size: int) -> SlotSampling:
        params = admission.params
        bias = params.logit_bias or {}
        words = params.bad_words_token_ids
        prompt = admission.token_ids[: admission.num_prompt_tokens] if params.repetition_penalty != 1.0 else []
        stops = [token for token in admission.stop_token_ids if token < vocab_size] if params.min_tokens else []
        prompt_ids = np.unique(_ids(prompt))
        return cls(
            params=params,
            seed=admission.seed,
            sample_index=admission.sample_index,
            num_prompt_tokens=admission.num_prompt_tokens,
            shape=Shape(params.temperature, max(params.top_k, 0), params.top_p, params.min_p),
            bias_ids=_ids(bias),
            bias_values=np.array(list(bias.values()), dtype=np.float32),
            allowed_ids=None if params.allowed_token_ids is None else _ids(params.allowed_token_ids),
            banned_ids=_ids([word[0] for word in words if len(word) == 1]),
            banned_sequences=tuple((list(word[:-1]), word[-1]) for word in words if len(word) > 1),
            stop_ids=_ids(stops),
            prompt_ids=prompt_ids[prompt_ids < vocab_size],
        )

    @property
    def edits(self) -> bool:
        """Whether `edit_logits` has anything to do for this request."""
        return bool(
            self.bias_ids.size
            or self.allowed_ids is not None
            or self.banned_ids.size
            or self.banned_sequences
            or self.stop_ids.size
            or self.penalises
        )

    @property
    def penalises(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def edit_logits(logits: torch.Tensor, rows: Sequence[tuple[int, SlotSampling]], histories: Histories) -> None:
    """Logit bias, allowed tokens, bad words, min_tokens and penalties, in this order, for the given rows in place.

    Args:
        logits: [rows, vocab] float32.
        rows: (row, what its slot asks for).
        histories: read only for rows whose changes depend on earlier tokens.
    """
    bias, banned = _Points(), _Points()
    for row, slot in rows:
        bias.add(row, slot.bias_ids, slot.bias_values)
        banned.add(row, slot.banned_ids)
        if slot.banned_sequences:
            banned.add(row, _completions(slot.banned_sequences, histories[row]))
        if slot.stop_ids.size and len(histories[row]) - slot.num_prompt_tokens < slot.params.min_tokens:
            banned.add(row, slot.stop_ids)
    if bias.rows:
        where, values = bias.tensors(logits.device)
        logits[where] += values
    for row, slot in rows:
        if slot.allowed_ids is not None:
            _keep_only(logits[row], slot.allowed_ids)
    if banned.rows:
        logits[banned.tensors(logits.device)[0]] = -math.inf
    _penalise(logits, [(row, slot) for row, slot in rows if slot.penalises], histories)


class _Points:
    """Single elements of a [rows, vocab] tensor, each with an optional value, gathered for one indexed update."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ids: list[TokenArray] = []
        self.values: list[npt.NDArray[np.float32]] = []

    def add(self, row: int, ids: TokenArray, values: npt.NDArray[np.float32] | float = 0.0) -> None:
        if ids.size:
            self.rows.append(row)
            self.ids.append(ids)
            self.values.append(np.broadcast_to(np.asarray(values, dtype=np.float32), ids.shape))

    def tensors(self, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        rows = np.repeat(np.array(self.rows, dtype=np.int64), [len(ids) for ids in self.ids])
        ids = np.concatenate(self.ids).astype(np.int64, copy=False)
        where = torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device)
        return where, torch.from_numpy(np.concatenate(self.values)).to(device)


def _penalise(logits: torch.Tensor, rows: Sequence[tuple[int, SlotSampling]], histories: Histories) -> None:
    """Repetition over prompt and output (Keskar et al. 2019, CTRL), then frequency and presence over the output."""
    repeated, counted = _Points(), _Points()
    for row, slot in rows:
        params = slot.params
        output_ids, counts = np.unique(histories[row][slot.num_prompt_tokens :], return_counts=True)
        if params.repetition_penalty != 1.0:
            # A token of both is stated twice; both statements read the old value and write the same new one.
            repeated.add(row, np.concatenate((slot.prompt_ids, output_ids)), params.repetition_penalty)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            amounts = params.frequency_penalty * counts + params.presence_penalty
            counted.add(row, output_ids, amounts.astype(np.float32))
    if repeated.rows:
        where, penalties = repeated.tensors(logits.device)
        values = logits[where]
        logits[where] = torch.where(values < 0, values * penalties, values / penalties)
    if counted.rows:
        where, amounts_tensor = counted.tensors(logits.device)
        logits[where] -= amounts_tensor


def _keep_only(row: torch.Tensor, ids: TokenArray) -> None:
    """Exclude every token but `ids` from one row [vocab]."""
    index = torch.from_numpy(ids).to(row.device)
    kept = row[index]
    row.fill_(-math.inf)
    row[index] = kept


def _completions(sequences: Sequence[tuple[list[int], int]], tokens: TokenArray) -> TokenArray:
    """Last tokens of the sequences whose beginning is what `tokens` ends with."""
    longest = max(len(beginning) for beginning, _ in sequences)
    tail = tokens[-longest:].tolist()
    return _ids([last for beginning, last in sequences if tail[-len(beginning) :] == beginning])


def _ids(tokens: Sequence[int] | dict[int, float]) -> TokenArray:
    return np.array(list(tokens), dtype=np.int64)
