"""Sampling whole steps on a device, without the host: the reference of `Kernels.sample`; and what `Kernels.sample` and
`Kernels.logprobs` take and give.

The numbers are those of `interlace.sampling.random` and the distribution that of `interlace.sampling.distribution`,
said here in shapes that no value decides, so that nothing waits for the device and a device graph can hold all of it.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch

from interlace.sampling.distribution import MIN_TEMPERATURE, Candidates, draw
from interlace.sampling.random import MULTIPLIERS, ROUNDS, WEYL, Purpose

_MASK = 0xFFFFFFFF


class SamplingColumns(NamedTuple):
    """How each row of a step draws its token: columns [rows], on the device of the logits."""

    temperature: torch.Tensor
    """float32; 0: the row takes its largest logit."""
    top_k: torch.Tensor
    """int32; 0: off."""
    top_p: torch.Tensor
    """float32; 1: off."""
    min_p: torch.Tensor
    """float32; 0: off."""
    seed: torch.Tensor
    """int64: the request's seed modulo 2^64, in two's complement."""
    sample_index: torch.Tensor
    """int64: which of a request's `n` samples the row belongs to."""
    position: torch.Tensor
    """int64: number of output tokens before the one that is drawn."""


class LogprobColumns(NamedTuple):
    """Log probabilities as tensors, by row. Entry 0 is the chosen token, the others are the most likely in order."""

    token_ids: torch.Tensor
    """[rows, entries] int64."""
    values: torch.Tensor
    """[rows, entries] float32."""
    ranks: torch.Tensor
    """[rows] int64: of the chosen token, 1 = most likely."""


class SamplingMode(enum.IntEnum):
    """The least that serves every row of a step. A row's token does not depend on it, as far as it serves the row."""

    GREEDY = 0
    """Every row takes its largest logit."""
    RANDOM = 1
    """No row uses top_k, top_p or min_p."""
    TRUNCATED = 2
    """Rows may use anything."""


def sample_rows(logits: torch.Tensor, columns: SamplingColumns, mode: SamplingMode) -> torch.Tensor:
    """See `Kernels.sample`."""
    peaks, best = logits.max(dim=1)  # the first of equal ones
    chosen = best
    if mode is not SamplingMode.GREEDY:
        temperature = columns.temperature[:, None]
        mass = _mass(logits / temperature.clamp_min(MIN_TEMPERATURE), columns, mode)
        drawn, valid = draw(Candidates([], None, mass), uniform_rows(columns))
        chosen = torch.where(columns.temperature > 0, torch.where(valid, drawn, -1), best)
    return torch.where(peaks.isfinite(), chosen, -1)


def _mass(logits: torch.Tensor, columns: SamplingColumns, mode: SamplingMode) -> torch.Tensor:
    """Logits over temperature [rows, vocab] -> probabilities, 0 where excluded."""
    if mode is SamplingMode.RANDOM:
        return torch.softmax(logits, dim=1)
    vocab = logits.shape[1]
    margin = columns.min_p.log()[:, None]
    logits = logits.masked_fill(logits < logits.amax(dim=1, keepdim=True) + margin, -torch.inf)
    descending, order = logits.sort(dim=1, descending=True)
    top_k = columns.top_k.long()[:, None]
    count = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    mass = torch.softmax(logits.masked_fill(logits < descending.gather(1, count - 1), -torch.inf), dim=1)
    likely = mass.gather(1, order)  # descending
    before = likely.cumsum(dim=1, dtype=torch.float64) - likely  # mass of the more likely tokens
    top_p = columns.top_p[:, None]
    count = ((before < top_p) | (top_p >= 1.0)).sum(dim=1, keepdim=True).clamp_min(1)
    return mass.masked_fill(mass < likely.gather(1, count - 1), 0.0)


def uniform_rows(columns: SamplingColumns, purpose: Purpose = Purpose.SAMPLE) -> torch.Tensor:
    """The numbers of `interlace.sampling.random.uniform`, bit for bit: [rows] float64 in [0, 1).

    Words of 32 bits are held in int64. A product of two may wrap; its bits are those of the unsigned product."""
    c0, c1 = columns.position & _MASK, torch.zeros_like(columns.position)
    c2, c3 = columns.sample_index & _MASK, torch.full_like(columns.position, int(purpose))
    k0, k1 = columns.seed & _MASK, (columns.seed >> 32) & _MASK
    for _ in range(ROUNDS):
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((right >> 32) & _MASK) ^ c1 ^ k0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return ((c0 >> 5) * (1 << 26) + (c1 >> 6)).double() * 2.0**-53
