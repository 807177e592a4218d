"""Root-mean-square norms: a row is summed by one program in a fixed order, so its bits never depend on the batch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from interlace.plugins.triton.runtime import launch

_TILE = 1024
"""Values of short rows (heads) that one program takes on."""
_MAX_WARPS = 16
_UNSPECIALISED = ("num_rows",)
"""Changes from step to step: Triton must not compile anew for 1 row, or multiples of 16."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool) -> torch.Tensor:
    """`Kernels.rms_norm` of x [tokens, size] or [tokens, heads, size]; the last dimension must be dense."""
    rows = x if x.dim() == 3 else x.unsqueeze(1)  # [tokens, heads, size]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, size = rows.shape
    constants = norm_constants(size, unit_offset)
    grid = (triton.cdiv(tokens * heads, constants["TILE"]) if size else 0,)
    launch(rms_norm_kernel, grid, rows, weight, out, tokens * heads, heads, size, *rows.stride()[:2], eps, **constants)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Kernels.add_rms_norm` of [tokens, size] tensors with a dense last dimension; the sum replaces `residual`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, size = x.shape
    constants = norm_constants(size, unit_offset)
    grid = (triton.cdiv(tokens, constants["TILE"]) if size else 0,)
    strides = (x.stride(0), residual.stride(0))
    launch(add_rms_norm_kernel, grid, x, residual, weight, out, tokens, size, *strides, eps, **constants)
    return out, residual


def norm_constants(size: int, unit_offset: bool) -> dict[str, Any]:
    """Compile-time arguments of both kernels for rows of `size` values: never a matter of how many rows there are."""
    block = triton.next_power_of_2(max(size, 1))
    tile = max(1, _TILE // block)
    warps = min(max(block * tile // 256, 1), _MAX_WARPS)
    return {"UNIT_OFFSET": unit_offset, "TILE": tile, "BLOCK": block, "num_warps": warps}


@triton.jit
def _normalise(x, weight, size, eps, UNIT_OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """x [tile, block] float32, 0 where a row has ended, normed along the last dimension; in DTYPE, rounded as the
    reference does: before the product with the weight, or with `weight + 1` after it."""
    mean = tl.sum(x * x, axis=1) / size  # [tile]
    normed = x * tl.rsqrt(mean + eps)[:, None]
    if UNIT_OFFSET:
        return (normed * (1.0 + weight.to(tl.float32))).to(DTYPE)
    return (normed.to(DTYPE).to(tl.float32) * weight.to(tl.float32)).to(DTYPE)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    heads,
    size,
    token_stride,
    head_stride,
    eps,
    UNIT_OFFSET: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    starts = rows // heads * token_stride + rows % heads * head_stride
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0)[None, :]
    x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=mask, other=0.0)
    normed = _normalise(x.to(tl.float32), weight, size, eps, UNIT_OFFSET, x.dtype)
    tl.store(out_ptr + rows[:, None] * size + columns[None, :], normed, mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    size,
    x_stride,
    residual_stride,
    eps,
    UNIT_OFFSET: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0)
    places = residual_ptr + rows[:, None] * residual_stride + columns[None, :]
    total = (x.to(tl.float32) + tl.load(places, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
    tl.store(places, total, mask=mask)
    normed = _normalise(total.to(tl.float32), weight, size, eps, UNIT_OFFSET, x.dtype)
    tl.store(out_ptr + rows[:, None] * size + columns[None, :], normed, mask=mask)
