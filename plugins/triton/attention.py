"""Attention over a paged cache as calls: what a step needs is made ready once, then run for every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from interlace.plugins.triton.attention_config import KernelConfig, LayerShape
from interlace.plugins.triton.attention_decode import MERGED_AT_ONCE, Pieces, decode_kernel, merge_kernel
from interlace.plugins.triton.attention_prefill import prefill_kernel
from interlace.plugins.triton.kv_cache import CacheView
from interlace.plugins.triton.runtime import launch


class DecodeLaunch(NamedTuple):
    """Pieces that one launch of the decode kernel serves."""

    pieces: Pieces
    most: int
    """Tokens that a piece may have; a power of two."""
    slots: int
    """Splits that a piece may have."""
    lanes: int
    align: int
    """A power of two: a token's place in a program is its position modulo this. 1: tokens lie from the first row on."""


class Layer(NamedTuple):
    """One layer's attention: its kind and numbers that do not change from step to step."""

    shape: LayerShape
    scale: float
    softcap: float
    decode: KernelConfig
    prefill: KernelConfig


def decode(
    layer: Layer, query: torch.Tensor, view: CacheView, tables: torch.Tensor, work: DecodeLaunch, out: torch.Tensor
) -> None:
    """Attend for pieces of few tokens. `query`, `out` [tokens, heads, head_size]; `out` dense."""
    shape, pieces = layer.shape, work.pieces
    num_pieces, heads = len(pieces.starts), query.shape[1]
    places = (num_pieces, work.slots, work.most, heads) if work.slots > 1 else (1,)
    acc, peak, total = (torch.empty(size, dtype=torch.float32, device=query.device) for size in (
        (*places, shape.head_size), places, places
    ))  # fmt: skip
    launch(
        decode_kernel, (num_pieces, shape.num_kv_heads, work.lanes),
        query, view.data, view.scales, tables, *pieces, out, acc, peak, total,
        *query.stride()[:2], out.stride(0), view.block_stride, tables.stride(0), work.slots, layer.scale, layer.softcap,
        **decode_constants(shape, layer.decode, work.most, work.align),
    )  # fmt: skip
    if work.slots > 1:
        launch(
            merge_kernel, (num_pieces * work.most, heads),
            *pieces[1:], out, acc, peak, total, out.stride(0), work.slots,
            **merge_constants(shape, work.most),
        )  # fmt: skip


def prefill(
    layer: Layer, query: torch.Tensor, view: CacheView, tables: torch.Tensor, pieces: Pieces, out: torch.Tensor
) -> None:
    """Attend for pieces of up to `LayerShape.prefill_count` tokens; otherwise as `decode`."""
    shape = layer.shape
    launch(
        prefill_kernel, (len(pieces.starts), shape.num_kv_heads),
        query, view.data, view.scales, tables, *pieces, out,
        *query.stride()[:2], out.stride(0), view.block_stride, tables.stride(0), layer.scale, layer.softcap,
        **prefill_constants(shape, layer.prefill),
    )  # fmt: skip


def decode_constants(shape: LayerShape, config: KernelConfig, count: int, align: int = 1) -> dict[str, Any]:
    """Compile-time arguments of `decode_kernel` for pieces of up to `count` tokens."""
    return _constants(shape, config) | {
        "COUNT": count,
        "MAX_SPLITS": shape.max_splits,
        "ALIGN": align,
        "BLOCK_M": max(config.rows, shape.decode_rows(max(count, align))),
    }


def prefill_constants(shape: LayerShape, config: KernelConfig) -> dict[str, Any]:
    """Compile-time arguments of `prefill_kernel`."""
    return _constants(shape, config) | {"BLOCK_M": config.rows}


def merge_constants(shape: LayerShape, count: int) -> dict[str, Any]:
    """Compile-time arguments of `merge_kernel`."""
    return {
        "NUM_HEADS": shape.num_kv_heads * shape.group,
        "HEAD_SIZE": shape.head_size,
        "WINDOW": shape.window,
        "COUNT": count,
        "MAX_SPLITS": shape.max_splits,
        "BLOCK_D": shape.block_d,
        "CHUNK": MERGED_AT_ONCE,
        "num_warps": 1,
    }


def _constants(shape: LayerShape, config: KernelConfig) -> dict[str, Any]:
    return {
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "HEAD_SIZE": shape.head_size,
        "BLOCK_SIZE": shape.block_size,
        "WINDOW": shape.window,
        "SOFTCAP": shape.softcap,
        "BLOCK_D": shape.block_d,
        "TILE": config.tile,
        "PRECISION": shape.precision,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
