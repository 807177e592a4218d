"""Linear layers, split over ranks by rows (outputs) or columns (inputs), fused where the checkpoint is not.

Each layer gathers this rank's part of its checkpoint tensors; when the last one has come it has the kernels prepare
the whole once (`Kernels.make_linear`, or `make_block_linear` where it comes in blocks) and lets the raw tensors go, so
loading never holds a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from interlace.interfaces.model import BuildContext
from interlace.interfaces.weights import BlockWeight, join_rows
from interlace.layers.parallel import HeadShare, share
from interlace.layers.weights import WeightTable

_ALL = slice(None)


class LinearPart(NamedTuple):
    """One checkpoint tensor inside a linear layer, and the part of it this rank holds."""

    name: str
    shape: tuple[int, int]
    """[out, in] of the whole tensor."""
    rows: slice | list[int] = _ALL
    """A list where one tensor holds several projections, so that a rank's rows lie apart."""
    columns: slice = _ALL

    @property
    def held(self) -> int:
        """Values in this rank's part of the weight."""
        rows = len(self.rows) if isinstance(self.rows, list) else len(range(*self.rows.indices(self.shape[0])))
        return rows * len(range(*self.columns.indices(self.shape[1])))


class Linear:
    """x W^T + b, W being the parts' rows one after the other: x [tokens, in] -> [tokens, sum of the parts' out].

    Not split: this is also the base of the parallel layers. `use_bias` false: the checkpoint has a bias, but
    another rank adds it.
    """

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        parts: list[LinearPart],
        bias: bool = False,
        use_bias: bool = True,
    ) -> None:
        self._build = build
        self._use_bias = use_bias
        # (tensor kind, part) → this rank's slice, until complete
        self._raw: dict[tuple[str, int], torch.Tensor | BlockWeight] = {}
        self._num_expected = len(parts) * (2 if bias else 1)
        self._run: Callable[[torch.Tensor], torch.Tensor] = _refuse
        for index, part in enumerate(parts):
            scope, place = weights.at(part.name), partial(self._place, "weight", index, (part.rows, part.columns))
            scope.expect("weight", part.shape, place, blocks=True, held=part.held)
            if bias:
                place = partial(self._place, "bias", index, (part.rows,))
                scope.expect("bias", part.shape[:1], place, held=part._replace(shape=(part.shape[0], 1)).held)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x)

    def _place(
        self, kind: str, index: int, where: tuple[slice | list[int], ...], weight: torch.Tensor | BlockWeight
    ) -> None:
        self._raw[kind, index] = weight[where]
        if len(self._raw) == self._num_expected:
            bias = self._join(self._parts("bias")) if self._use_bias and ("bias", 0) in self._raw else None
            weights = self._parts("weight")
            self._raw.clear()
            kernels = self._build.kernels
            blocks = [part for part in weights if isinstance(part, BlockWeight)]
            if len(blocks) == len(weights):
                self._run = kernels.make_block_linear([part.to(self._build.device) for part in blocks], bias)
            else:
                self._run = kernels.make_linear(self._join(weights), bias)

    def _parts(self, kind: str) -> list[torch.Tensor | BlockWeight]:
        """The parts of one kind in order."""
        return [self._raw[key] for key in sorted(self._raw) if key[0] == kind]

    def _join(self, parts: list[torch.Tensor | BlockWeight]) -> torch.Tensor:
        """One tensor in memory of its own (the parts may lie in a mapped file), in the type they were shipped in;
        blocks are decoded straight into the type they are kept in."""
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if len(tensors) == len(parts):
            return torch.cat(tensors).to(self._build.device)
        return join_rows(parts, self._build.kernels.spec.decoded_dtype, self._build.device)


def _refuse(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("this linear layer has no weights yet: call the model's load_weights first")


class ColumnParallelLinear(Linear):
    """Outputs split over ranks: the whole x -> this rank's part of each output, several checkpoint tensors fused.

    `outputs`: name of each tensor → its number of outputs, e.g. {"gate_proj": 1536, "up_proj": 1536}.
    """

    def __init__(
        self, build: BuildContext, weights: WeightTable, outputs: Mapping[str, int], in_size: int, bias: bool = False
    ) -> None:
        rank, size = build.parallel.rank, build.parallel.size
        parts = [
            LinearPart(name, (out_size, in_size), share(out_size, rank, size, f"the outputs of {name}", build.grain))
            for name, out_size in outputs.items()
        ]
        super().__init__(build, weights, parts, bias)


class QKVLinear(Linear):
    """Query, key and value projection in one: hidden -> this rank's query heads, then key heads, then value heads.

    With fewer KV heads than ranks, neighbouring ranks hold copies of a KV head (`share_heads`).
    """

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        heads: HeadShare,
        bias: bool = False,
    ) -> None:
        kv_shape = (num_kv_heads * head_size, hidden_size)
        parts = [
            LinearPart("q_proj", (num_heads * head_size, hidden_size), heads.query_part(head_size)),
            LinearPart("k_proj", kv_shape, heads.kv_part(head_size)),
            LinearPart("v_proj", kv_shape, heads.kv_part(head_size)),
        ]
        super().__init__(build, weights, parts, bias)


class RowParallelLinear(Linear):
    """Inputs split over ranks: this rank's part of x -> the whole output, on all ranks, in one of two ways.

    *Sum*: a rank holds the columns of its inputs, and what all make of theirs is summed. *Gather* (`build.gather`): the
    inputs are gathered, a rank holds the rows of some outputs, and these are gathered. Weights and products are the
    same in number, exchanges are two instead of one; but each value is computed whole, as one rank alone does.

    `columns`: the inputs of each rank; by default those that `ColumnParallelLinear` leaves them of as many outputs.
    """

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        name: str,
        in_size: int,
        out_size: int,
        bias: bool = False,
        columns: Sequence[slice] | None = None,
    ) -> None:
        self._parallel = build.parallel
        # Where both are gathered: how many inputs and outputs each rank has.
        self._widths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        rank, size = build.parallel.rank, build.parallel.size
        columns = columns or _shares(in_size, size, f"the inputs of {name}", build.grain)
        part = LinearPart(name, (out_size, in_size), columns=columns[rank])
        if build.gather and size > 1:
            rows = _shares(out_size, size, f"the outputs of {name}")
            part = LinearPart(name, (out_size, in_size), rows=rows[rank])
            self._widths = _widths(columns), _widths(rows)
        super().__init__(build, weights, [part], bias, use_bias=rank == 0 or self._widths is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._widths is None:
            return self._parallel.all_reduce(self._run(x))
        inputs, outputs = self._widths
        return self._parallel.all_gather(self._run(self._parallel.all_gather(x, inputs)), outputs)


def _shares(total: int, size: int, what: str, grain: int = 1) -> list[slice]:
    return [share(total, rank, size, what, grain) for rank in range(size)]


def _widths(parts: Sequence[slice]) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in parts)
