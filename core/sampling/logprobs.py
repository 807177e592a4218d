"""Log probabilities of the raw model distribution: of the chosen token, of the most likely ones, and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from interlace.messages import TokenLogprobs
from interlace.sampling.distribution import largest
from interlace.sampling.params import MAX_LOGPROBS

_ROWS_AT_ONCE = 64
"""Prompt positions normalised together; bounds the memory beside the logits."""


def select_logprobs(logprobs: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Report row by row what was asked for.

    Args:
        logprobs: [rows, vocab] float32 log probabilities.
        token_ids: the chosen token of each row.
        counts: how many of the most likely tokens to report beside it, up to `MAX_LOGPROBS`.

    Returns:
        One entry per row. The chosen token is entry 0 and appears again where it is one of the most likely.
    """
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])  # [rows, 1]
    ranks = ((logprobs > chosen).sum(dim=1) + 1).tolist()
    values = chosen.squeeze(1).tolist()
    top_ids: list[list[int]] = [[]] * len(values)
    top_values: list[list[float]] = [[]] * len(values)
    if any(counts):
        # Always the same width: which of several equal tokens come first must not depend on the other rows.
        best, columns = largest(logprobs, min(MAX_LOGPROBS, logprobs.shape[1]))
        top_ids, top_values = columns.tolist(), best.tolist()
    return [
        TokenLogprobs([token, *top_ids[row][:count]], [values[row], *top_values[row][:count]], ranks[row])
        for row, (token, count) in enumerate(zip(token_ids, counts, strict=True))
    ]


def prompt_logprobs(logits: torch.Tensor, next_token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The same for positions of a prompt: `logits` [positions, vocab] predict `next_token_ids`, one per position."""
    result: list[TokenLogprobs] = []
    for start in range(0, logits.shape[0], _ROWS_AT_ONCE):
        token_ids = next_token_ids[start : start + _ROWS_AT_ONCE]
        logprobs = torch.log_softmax(logits[start : start + _ROWS_AT_ONCE], dim=1)
        result += select_logprobs(logprobs, [int(token) for token in token_ids], [count] * len(token_ids))
    return result
