"""What products by 8-bit activations must come to, written a second time: slowly, in float64."""

from __future__ import annotations

import pytest
import torch


def _quantized(x: torch.Tensor, isa: str, block: int = 32) -> torch.Tensor:
    """x [rows, in] as the native kernels see it where weights are small integers, in float64: per 32 inputs, rounded to
    127 steps each way of the largest. `isa`: with fused multiply-adds the quotient is rounded once, else twice."""
    rows, size = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -size % block)).view(rows, -(-size // block), block)
    scale = blocks.abs().amax(-1, keepdim=True) * torch.tensor(1 / 127)
    scale = torch.where(scale < 1.2e-38, 0, scale)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    quotient = (blocks * inverse).double() if isa == "portable" else blocks.double() * inverse.double()
    return (quotient.round() * scale.double()).flatten(1)[:, :size]


def _int8_weight(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] after packing as int8: 127 steps each way of each row's largest value, in float64."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale > 1.18e-38, 1 / scale, 0)
    return (weight.float() * inverse).round().double() * scale.double()


@pytest.fixture
def quantized():
    return _quantized


@pytest.fixture
def int8_weight():
    return _int8_weight
