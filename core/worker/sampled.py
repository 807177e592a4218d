"""`Sampled`: room for what steps sample, on the device and, pinned, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from interlace.messages import TokenLogprobs
from interlace.sampling.device import LogprobColumns
from interlace.sampling.logprobs import entries_of
from interlace.worker.step_buffers import Layout

Array = npt.NDArray[Any]


class Sampled:
    """Tokens of a step's rows that sample and, where some asked for them, their log probabilities."""

    def __init__(self, rows: int, entries: int, make: Callable[[int], torch.Tensor]) -> None:
        """`entries`: log probabilities per row. `make` gives so many bytes, as uint8."""
        tokens = [("token_ids", "int64", rows), ("ranks", "int64", rows)]
        layout = Layout([*tokens, ("ids", "int64", rows * entries), ("values", "float32", rows * entries)])
        parts = layout.on_device(make(layout.num_bytes))
        self.token_ids = parts["token_ids"]  # [rows] int64
        ids, values = (parts[name].view(rows, entries) for name in ("ids", "values"))
        self.logprobs = LogprobColumns(ids, values, parts["ranks"])

    def keep(self, token_ids: torch.Tensor, logprobs: LogprobColumns | None) -> None:
        """Work: the first rows become these."""
        pairs = [(self.token_ids, token_ids), *(zip(self.logprobs, logprobs, strict=True) if logprobs else ())]
        for target, source in pairs:
            target[: len(source)].copy_(source)

    def fetch(self, other: Sampled, rows: int, with_logprobs: bool) -> None:
        """Work: the first rows become those of `other`, which is on the device while this is pinned."""
        pairs = [(self.token_ids, other.token_ids)]
        if with_logprobs:
            pairs += zip(self.logprobs, other.logprobs, strict=True)
        for target, source in pairs:
            target[:rows].copy_(source[:rows], non_blocking=True)


def reported(columns: LogprobColumns, rows: Sequence[int], counts: Array) -> dict[int, list[TokenLogprobs]]:
    """Row of the plan → its entry, for those of `rows`, which `columns` belong to, whose count is not negative."""
    asked = np.flatnonzero(counts >= 0)
    index = torch.from_numpy(asked).to(columns.values.device)
    entries = entries_of(LogprobColumns(*(part[index] for part in columns)), counts[asked].tolist())
    return {rows[place]: [entry] for place, entry in zip(asked.tolist(), entries, strict=True)}
