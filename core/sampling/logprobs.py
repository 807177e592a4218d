"""Log probabilities of the raw model distribution: of the chosen token, of the most likely ones, and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from interlace.messages import TokenLogprobs
from interlace.sampling.device import LogprobColumns
from interlace.sampling.distribution import largest
from interlace.sampling.params import MAX_LOGPROBS

_ROWS_AT_ONCE = 64
"""Prompt positions normalised together; bounds the memory beside the logits."""


def logprob_columns(logprobs: torch.Tensor, token_ids: torch.Tensor, most: int) -> LogprobColumns:
    """Of `logprobs` [rows, vocab] float32: those of `token_ids` [rows] int64 and of the `most` likely tokens. Waits for
    no device."""
    chosen = logprobs.gather(1, token_ids[:, None])  # [rows, 1]
    ranks = (logprobs > chosen).sum(dim=1) + 1
    best, columns = largest(logprobs, most)
    return LogprobColumns(torch.cat((token_ids[:, None], columns), 1), torch.cat((chosen, best), 1), ranks)


def report_logits(logits: torch.Tensor, token_ids: torch.Tensor) -> LogprobColumns:
    """The reference of `Kernels.logprobs`: every row gets everything."""
    logprobs = torch.log_softmax(logits, dim=1)
    return logprob_columns(logprobs, token_ids.clamp_min(0), min(MAX_LOGPROBS, logits.shape[1]))


def entries_of(columns: LogprobColumns, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Row by row the chosen token, and `counts` of the most likely ones beside it. Waits for the device."""
    token_ids, values, ranks = (part.tolist() for part in columns)
    return [
        TokenLogprobs(token_ids[row][: 1 + count], values[row][: 1 + count], ranks[row])
        for row, count in enumerate(counts)
    ]


def select_logprobs(logprobs: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Report row by row what was asked for.

    Args:
        logprobs: [rows, vocab] float32 log probabilities.
        token_ids: the chosen token of each row.
        counts: how many of the most likely tokens to report beside it, up to `MAX_LOGPROBS`.

    Returns:
        One entry per row. The chosen token is entry 0 and appears again where it is one of the most likely.
    """
    # Always the same width: which of several equal tokens come first must not depend on the other rows.
    most = min(MAX_LOGPROBS, logprobs.shape[1]) if any(counts) else 0
    return entries_of(logprob_columns(logprobs, torch.tensor(token_ids, device=logprobs.device), most), counts)


def prompt_logprobs(logits: torch.Tensor, next_token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The same for positions of a prompt: `logits` [positions, vocab] predict `next_token_ids`, one per position."""
    result: list[TokenLogprobs] = []
    for start in range(0, logits.shape[0], _ROWS_AT_ONCE):
        token_ids = next_token_ids[start : start + _ROWS_AT_ONCE]
        logprobs = torch.log_softmax(logits[start : start + _ROWS_AT_ONCE], dim=1)
        result += select_logprobs(logprobs, [int(token) for token in token_ids], [count] * len(token_ids))
    return result
