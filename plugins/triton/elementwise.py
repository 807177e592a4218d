"""Gated activations, scaling and embedding lookup: every value by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.runtime import launch

BLOCK = 1024
"""Values that one program computes."""


def gate_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up for gate_up [tokens, 2 * size] with a dense last dimension; `silu` or `gelu` (tanh)."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(size, BLOCK))
    launch(gate_mul_kernel, grid, gate_up, out, size, gate_up.stride(0), GELU=activation == "gelu", BLOCK=BLOCK)
    return out


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor for x [rows, size] with a dense last dimension."""
    rows, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(scale_kernel, (rows, triton.cdiv(size, BLOCK)), x, out, size, x.stride(0), factor, BLOCK=BLOCK)
    return out


def embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[token_ids] for token_ids [tokens], weight [vocab, size] with a dense last dimension.

    An id outside the table gives a row of NaN instead of a read of foreign memory."""
    tokens, (vocab, size) = token_ids.shape[0], weight.shape
    out = torch.empty((tokens, size), dtype=weight.dtype, device=weight.device)
    strides = (token_ids.stride(0), weight.stride(0))
    grid = (tokens, triton.cdiv(size, BLOCK))
    launch(embedding_kernel, grid, token_ids, weight, out, vocab, size, *strides, BLOCK=BLOCK)
    return out


@triton.jit
def _tanh(x):
    """tanh by one exponential that cannot overflow; exact at infinities."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def gate_mul_kernel(gate_up_ptr, out_ptr, size, row_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    start = gate_up_ptr + row * row_stride
    gate = tl.load(start + columns, mask=mask, other=0.0)
    up = tl.load(start + size + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    if GELU:
        # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), Hendrycks and Gimpel, arXiv 1606.08415
        active = 0.5 * wide * (1.0 + _tanh(0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)))
    else:
        active = wide / (1.0 + tl.exp(-wide))
    # rounded where the reference, a chain of torch ops, rounds
    product = active.to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + columns, product.to(gate.dtype), mask=mask)


@triton.jit
def scale_kernel(x_ptr, out_ptr, size, row_stride, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(x_ptr + row * row_stride + columns, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + columns, (x.to(tl.float32) * factor).to(x.dtype), mask=mask)


@triton.jit
def embedding_kernel(ids_ptr, weight_ptr, out_ptr, vocab, size, id_stride, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    token = tl.load(ids_ptr + row * id_stride).to(tl.int64)
    is_known = (token >= 0) & (token < vocab)
    values = tl.load(weight_ptr + token * row_stride + columns, mask=mask & is_known, other=float("nan"))
    tl.store(out_ptr + row * size + columns, values, mask=mask)
