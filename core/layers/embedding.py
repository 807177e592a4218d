"""Token embedding and output head, the vocabulary split over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from interlace.interfaces.model import BuildContext
from interlace.interfaces.weights import BlockWeight
from interlace.layers.weights import WeightTable


class VocabParallelEmbedding:
    """token ids [tokens] -> [tokens, hidden]. Each rank holds an equal range of rows, the last one perhaps padded
    with zeros; ids of other ranks' rows add zero before the sum over the ranks.

    Blocks stay in the mapped file where the kernels keep them: only rows that are looked up are read."""

    def __init__(self, build: BuildContext, weights: WeightTable, vocab_size: int, hidden_size: int) -> None:
        self._build = build
        self._parallel = build.parallel
        self._rows = -(-vocab_size // build.parallel.size)
        self._first = build.parallel.rank * self._rows
        self._look_up: Callable[[torch.Tensor], torch.Tensor] = _refuse
        self.weight: torch.Tensor | BlockWeight | None = None
        """[this rank's rows, hidden], once loaded: what a tied head is made of."""
        held = max(0, min(self._rows, vocab_size - self._first)) * hidden_size
        weights.expect("weight", (vocab_size, hidden_size), self._place, blocks=True, held=held)

    def _place(self, weight: torch.Tensor | BlockWeight) -> None:
        build = self._build
        kernels = build.kernels
        part = weight[self._first : self._first + self._rows]
        if isinstance(part, BlockWeight):
            self.weight = part.pad(self._rows).to(build.device)
            self._look_up = kernels.make_block_embedding(self.weight)
            return
        self.weight = table = torch.zeros(self._rows, part.shape[1], dtype=build.dtype, device=build.device)
        table[: part.shape[0]].copy_(part)
        self._look_up = lambda token_ids: kernels.embedding(token_ids, table)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return self._look_up(token_ids)
        local = token_ids - self._first
        foreign = (local < 0) | (local >= self._rows)  # [tokens]
        rows = self._look_up(local.masked_fill(foreign, 0))
        return self._parallel.all_reduce(rows.masked_fill(foreign.unsqueeze(-1), 0))


def _refuse(token_ids: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("this embedding has no weights yet: call the model's load_weights first")


class VocabParallelHead:
    """hidden [rows, hidden] -> logits [rows, vocab] in float32, the same on every rank.

    With `tied`, the head uses the embedding's weight (kernels may keep a packed copy of it) and needs no tensor of
    its own; otherwise it expects `weight`. `is_embedding`: that is the embedding's, which another stage holds; it is
    rounded to the compute type first, as there.
    """

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        vocab_size: int,
        hidden_size: int,
        tied: VocabParallelEmbedding | None = None,
        is_embedding: bool = False,
    ) -> None:
        self._build = build
        self._dtype = build.dtype if is_embedding else None
        self._vocab_size = vocab_size
        self._tied = tied
        self._run: Callable[[torch.Tensor], torch.Tensor] | None = None
        rows = -(-vocab_size // build.parallel.size)
        self._range = slice(build.parallel.rank * rows, (build.parallel.rank + 1) * rows)
        if tied is None:
            held = max(0, min(self._range.stop, vocab_size) - self._range.start) * hidden_size
            weights.expect("weight", (vocab_size, hidden_size), self._place, blocks=True, held=held)
        else:
            weights.ignore("lm_head.weight")  # some checkpoints ship the tied weight twice

    def _place(self, weight: torch.Tensor | BlockWeight) -> None:
        part = weight[self._range]
        rows = self._range.stop - self._range.start
        if isinstance(part, BlockWeight):
            self._make(part.pad(rows).to(self._build.device))
        else:
            padded = torch.cat((part, part.new_zeros(rows - part.shape[0], part.shape[1])))
            self._make(padded.to(self._build.device, self._dtype))

    def _make(self, weight: torch.Tensor | BlockWeight) -> None:
        self._run = self._build.kernels.make_head(weight if isinstance(weight, torch.Tensor) else [weight])

    def finish(self) -> None:
        """Call once after loading: ties the head to the loaded embedding where the model says so."""
        if self._tied is not None:
            if self._tied.weight is None:
                raise RuntimeError("the output head is tied to an embedding that has no weights yet")
            self._make(self._tied.weight)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._run is None:
            raise RuntimeError("the output head has no weights yet: call the model's load_weights first")
        part = self._run(hidden)  # [rows, this rank's part of the vocabulary]
        return self._build.parallel.all_gather(part)[:, : self._vocab_size]
