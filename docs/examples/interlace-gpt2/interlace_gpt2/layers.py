"""What GPT-2 has and Interlace's own models have not: layer norm, and a feed-forward network without a gate."""

from __future__ import annotations

import torch
from interlace.errors import CheckpointError
from interlace.interfaces.model import BuildContext
from interlace.layers.linear import ColumnParallelLinear, RowParallelLinear
from interlace.layers.weights import WeightTable
from torch.nn.functional import gelu, layer_norm

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""`activation_function` of a checkpoint → how torch approximates it."""


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
