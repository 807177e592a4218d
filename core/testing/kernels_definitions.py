"""What ops of kernels are, in float64: what the conformance suite compares them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Arguments = dict[str, Any]
"""Arguments of an op by name: tensors and plain values."""


def _rms_norm(given: Arguments) -> tuple[torch.Tensor, ...]:
    x = given["x"].double()
    weight = given["weight"].double() + given["unit_offset"]
    return (x / (x.pow(2).mean(-1, keepdim=True) + given["eps"]).sqrt() * weight,)


def _add_rms_norm(given: Arguments) -> tuple[torch.Tensor, ...]:
    total = given["x"].double() + given["residual"].double()
    return (*_rms_norm({**given, "x": total}), total)


def _rope(given: Arguments) -> tuple[torch.Tensor, ...]:
    table = given["cos_sin"].double()[given["positions"]].unsqueeze(1)  # [tokens, 1, rotary]
    half = table.shape[-1] // 2
    turn = torch.complex(table[..., :half], table[..., half:])
    results = []
    for x in (given["query"].double(), given["key"].double()):
        turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
        results.append(torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1))
    return tuple(results)


def _silu_mul(given: Arguments) -> tuple[torch.Tensor, ...]:
    gate, up = given["gate_up"].double().chunk(2, dim=-1)
    return (gate / (1 + (-gate).exp()) * up,)


def _gelu_mul(given: Arguments) -> tuple[torch.Tensor, ...]:
    gate, up = given["gate_up"].double().chunk(2, dim=-1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return (0.5 * gate * (1 + inner.tanh()) * up,)


def _embedding(given: Arguments) -> tuple[torch.Tensor, ...]:
    return (given["weight"].double()[given["token_ids"]],)


DEFINITIONS: Mapping[str, Callable[[Arguments], tuple[torch.Tensor, ...]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "silu_mul": _silu_mul,
    "gelu_mul": _gelu_mul,
    "embedding": _embedding,
}
"""Op → its results for these arguments."""
