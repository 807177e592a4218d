"""Token embedding and output head, the vocabulary split over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from interlace.interfaces.model import BuildContext
from interlace.layers.weights import WeightTable


class VocabParallelEmbedding:
    """token ids [tokens] -> [tokens, hidden]. Each rank holds an equal range of rows, the last one perhaps padded
    with zeros; ids of other ranks' rows add zero before the sum over the ranks."""

    def __init__(self, build: BuildContext, weights: WeightTable, vocab_size: int, hidden_size: int) -> None:
        self._kernels = build.kernels
        self._parallel = build.parallel
        rows = -(-vocab_size // build.parallel.size)
        self._first = build.parallel.rank * rows
        self._rows = rows
        self.weight = torch.zeros(rows, hidden_size, dtype=build.dtype, device=build.device)
        weights.expect("weight", (vocab_size, hidden_size), self._place)

    def _place(self, tensor: torch.Tensor) -> None:
        part = tensor[self._first : self._first + self._rows]
        self.weight[: part.shape[0]].copy_(part)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return self._kernels.embedding(token_ids, self.weight)
        local = token_ids - self._first
        foreign = (local < 0) | (local >= self._rows)  # [tokens]
        rows = self._kernels.embedding(local.masked_fill(foreign, 0), self.weight)
        return self._parallel.all_reduce(rows.masked_fill(foreign.unsqueeze(-1), 0))


class VocabParallelHead:
    """hidden [rows, hidden] -> logits [rows, vocab] in float32, the same on every rank.

    With `tied`, the head uses the embedding's weight (kernels may keep a packed copy of it) and needs no tensor of
    its own; otherwise it expects `weight`.
    """

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        vocab_size: int,
        hidden_size: int,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        self._build = build
        self._vocab_size = vocab_size
        self._tied = tied
        self._run: Callable[[torch.Tensor], torch.Tensor] | None = None
        rows = -(-vocab_size // build.parallel.size)
        self._range = slice(build.parallel.rank * rows, (build.parallel.rank + 1) * rows)
        if tied is None:
            weights.expect("weight", (vocab_size, hidden_size), self._place)
        else:
            weights.ignore("lm_head.weight")  # some checkpoints ship the tied weight twice

    def _place(self, tensor: torch.Tensor) -> None:
        part = tensor[self._range]
        missing = (self._range.stop - self._range.start) - part.shape[0]
        padded = torch.cat((part, part.new_zeros(missing, part.shape[1])))
        self._run = self._build.kernels.make_linear(padded.to(self._build.device))

    def finish(self) -> None:
        """Call once after loading: ties the head to the loaded embedding where the model says so."""
        if self._tied is not None:
            self._run = self._build.kernels.make_linear(self._tied.weight)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._run is None:
            raise RuntimeError("the output head has no weights yet: call the model's load_weights first")
        part = self._run(hidden).float()  # [rows, this rank's part of the vocabulary]
        return self._build.parallel.all_gather(part)[:, : self._vocab_size]
