"""Root-mean-square norm, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch

from interlace.interfaces.model import BuildContext
from interlace.layers.weights import WeightTable


class RMSNorm:
    """x / rms(x) * weight over the last dimension. `unit_offset`: the checkpoint stores weight - 1 (Gemma)."""

    def __init__(
        self, build: BuildContext, weights: WeightTable, size: int, eps: float, unit_offset: bool = False
    ) -> None:
        self._kernels = build.kernels
        self.weight = torch.empty(size, dtype=build.dtype, device=build.device)
        """[size], filled while loading."""
        self._eps = eps
        self._unit_offset = unit_offset
        weights.expect("weight", (size,), self.weight.copy_)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self._eps, self._unit_offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); `residual` may be overwritten."""
        return self._kernels.add_rms_norm(x, residual, self.weight, self._eps, self._unit_offset)
