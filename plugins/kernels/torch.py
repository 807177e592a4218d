"""Kernels `torch`: the reference ops of the contract, with linears prepacked by oneDNN on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import BaseModel

from interlace.interfaces.kernels import Kernels, KernelSpec

_PROBE_ROWS = 8
"""oneDNN chooses the packed layout for a number of rows; decode steps have few."""


class TorchKernels(Kernels):
    """Runs anywhere. On CPU a linear's weight is reordered once into oneDNN's blocked layout, which
    `torch.nn.functional.linear` does anew in every call."""

    # Plain copies, products and sums: no reduction, no vector form of exp whose last bits depend on the alignment.
    batch_invariant: ClassVar[frozenset[str]] = frozenset({"embedding", "rope"})

    def __init__(self, options: BaseModel, spec: KernelSpec) -> None:
        super().__init__(options, spec)
        self._weight_dtype: torch.dtype = getattr(torch, spec.weight_dtype)
        self._why_not_packed = _why_not_packed(spec)

    def describe(self, op: str) -> str:
        if op != "make_linear":
            return "torch reference"
        kept = f"weights in {self.spec.weight_dtype}"
        if self._why_not_packed is None:
            return f"prepacked oneDNN, {kept}"
        return f"torch.nn.functional.linear, {kept} ({self._why_not_packed})"

    def make_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._why_not_packed is not None:
            return super().make_linear(weight, bias)
        dtype = self._weight_dtype
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), _PROBE_ROWS)
        kept_bias = None if bias is None else bias.to(dtype)
        run = torch.ops.mkldnn._linear_pointwise

        def linear(x: torch.Tensor) -> torch.Tensor:
            product: torch.Tensor = run(x, packed, kept_bias, "none", [], "")
            return product

        def converting_linear(x: torch.Tensor) -> torch.Tensor:
            return linear(x.to(dtype)).to(x.dtype)

        return linear if self.spec.weight_dtype == self.spec.dtype else converting_linear


def _why_not_packed(spec: KernelSpec) -> str | None:
    """None if oneDNN packs weights of this type here, else the reason against."""
    if torch.device(spec.device).type != "cpu":
        return f"device {spec.device}"
    try:
        dtype = getattr(torch, spec.weight_dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), _PROBE_ROWS)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 16, dtype=dtype), packed, None, "none", [], "")
    except (RuntimeError, AttributeError):  # no oneDNN, no such instructions, or torch renamed its internal op
        return f"oneDNN does not pack {spec.weight_dtype} on this CPU"
    return None
