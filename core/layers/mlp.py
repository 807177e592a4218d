"""The gated feed-forward network of the Llama lineage."""

from __future__ import annotations

import torch

from interlace.errors import CheckpointError
from interlace.interfaces.model import BuildContext
from interlace.layers.linear import ColumnParallelLinear, RowParallelLinear
from interlace.layers.weights import WeightTable


class GatedMLP:
    """down(activation(gate(x)) * up(x)), gate and up in one matrix.

    `activation`: `silu`, or `gelu_pytorch_tanh` (also spelt `gelu_tanh`). Raises `CheckpointError` for another one."""

    def __init__(
        self,
        build: BuildContext,
        weights: WeightTable,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = False,
    ) -> None:
        known = {"silu": build.kernels.silu_mul}
        known["gelu_pytorch_tanh"] = known["gelu_tanh"] = build.kernels.gelu_mul
        if activation not in known:
            raise CheckpointError(f"hidden_act = '{activation}' is not supported; known: {', '.join(known)}")
        self._activate_and_multiply = known[activation]
        outputs = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self._gate_up = ColumnParallelLinear(build, weights, outputs, hidden_size, bias)
        self._down = RowParallelLinear(build, weights, "down_proj", intermediate_size, hidden_size, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._activate_and_multiply(self._gate_up(x)))
