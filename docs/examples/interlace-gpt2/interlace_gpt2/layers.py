"""What GPT-2 has and Interlace's own models have not: layer norm, a feed-forward network without a gate, and matrices
that lie the other way round, query, key and value in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from interlace.errors import CheckpointError
from interlace.interfaces.model import BuildContext
from interlace.layers.linear import ColumnParallelLinear, Linear, LinearPart, RowParallelLinear
from interlace.layers.weights import WeightTable
from torch.nn.functional import gelu, layer_norm

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""`activation_function` of a checkpoint → how torch approximates it."""


class Conv1DTable(WeightTable):
    """The table of a model, for linear layers whose matrices the checkpoint stores as [in, out]."""

    def __init__(self, weights: WeightTable) -> None:
        super().__init__()
        self._weights = weights

    def at(self, name: str) -> WeightTable:
        return Conv1DTable(self._weights.at(name))

    def expect(
        self,
        name: str,
        shape: tuple[int, ...],
        place: Callable[[torch.Tensor], object],
        *,
        blocks: bool = False,
        held: int | None = None,
    ) -> None:
        # Blocks lie along the rows and cannot be transposed: whatever the layer takes, it gets values.
        self._weights.expect(name, shape[::-1], lambda tensor: place(tensor.t()), held=held)


class FusedQKV(Linear):
    """Query, key and value projection out of one tensor: hidden -> this rank's query, key and value heads."""

    def __init__(self, build: BuildContext, weights: WeightTable, name: str, size: int, mine: slice) -> None:
        """`size`: outputs of each of the three; `mine`: those of them that are this rank's."""
        rows = [part * size + row for part in range(3) for row in range(mine.start, mine.stop)]
        super().__init__(build, weights, [LinearPart(name, (3 * size, size), rows)], bias=True)


class LayerNorm:
    """(x - mean) / deviation * weight + bias over the last dimension."""

    def __init__(self, build: BuildContext, weights: WeightTable, size: int, eps: float) -> None:
        self._weight = torch.empty(size, dtype=build.dtype, device=build.device)
        self._bias = torch.empty_like(self._weight)
        self._eps = eps
        weights.expect("weight", (size,), self._weight.copy_)
        weights.expect("bias", (size,), self._bias.copy_)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class MLP:
    """c_proj(gelu(c_fc(x))). Raises `CheckpointError` for an activation that is not known."""

    def __init__(
        self, build: BuildContext, weights: WeightTable, hidden_size: int, inner_size: int, activation: str
    ) -> None:
        if activation not in GELU:
            raise CheckpointError(f"activation_function = '{activation}' is not supported; known: {', '.join(GELU)}")
        self._approximate = GELU[activation]
        self._in = ColumnParallelLinear(build, weights, {"c_fc": inner_size}, hidden_size, bias=True)
        self._out = RowParallelLinear(build, weights, "c_proj", inner_size, hidden_size, bias=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._out(gelu(self._in(x), approximate=self._approximate))
