"""Attention `native`: paged attention in C++ (see plugins/native/src/attention.h), for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.attention import AttentionBackend, AttentionSpec, CacheLayout
from interlace.plugins.native import library as native
from interlace.plugins.native.library import ATTENTION, Library, NativeUnavailableError, Op, Step, make_op
from interlace.plugins.native.step import StepBuffers
from interlace.plugins.native.tape import Recording
from interlace.worker.batch import ForwardBatch

_GRANULE = 16
"""Tokens that lie together in the cache."""
_MAX_HEAD_SIZE = 256
_SCALE_BYTES = 4
_DTYPES = ("float32", "bfloat16")


class Metadata(NamedTuple):
    """One step of one KV group, and what its pointers point to."""

    step: Step
    group: int
    buffers: StepBuffers
    batch: ForwardBatch


class NativeAttention(AttentionBackend):
    """Rows go through fixed tiles of 256 positions in order, so bits depend on nothing but the sequence itself."""

    class Options(BaseModel):
        """Options of the native attention."""

        model_config = ConfigDict(extra="forbid")

        isa: Literal["auto", "avx512", "avx2", "portable"] = Field(
            default="auto", description="Instruction set to use; `auto`: the best this CPU has."
        )
        kv_dtype: Literal["auto", "int8"] = Field(
            default="auto",
            description="How keys and values are kept: `auto`: in the compute type; `int8`: in 8 bits, with a scale "
            "per token and head, which halves a bfloat16 cache and rounds it.",
        )

    batch_invariant = True

    def __init__(self, options: BaseModel, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> None:
        super().__init__(options, spec, block_size, dtype, device)
        self.library = Library(torch.get_num_threads(), self.options.isa)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._is_int8 = self.options.kv_dtype == "int8"

    @classmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        if torch.device(device).type != "cpu":
            return f"runs on the CPU, not on {device}"
        if dtype not in _DTYPES:
            return f"runs in {', '.join(_DTYPES)}, not in {dtype}"
        if spec.kind not in ("full", "window"):
            return f"knows layers of kind full and window, not '{spec.kind}'"
        if spec.kind == "window" and spec.window < 1:
            return f"a window of {spec.window} tokens is empty"
        if spec.head_size % 8 or not 8 <= spec.head_size <= _MAX_HEAD_SIZE:
            return f"head sizes are multiples of 8 up to {_MAX_HEAD_SIZE}, not {spec.head_size}"
        if not spec.softmax_scale > 0:
            return f"scales scores by a number above 0, not by {spec.softmax_scale}"
        if block_size % _GRANULE or block_size < _GRANULE:
            return f"block sizes are multiples of {_GRANULE}, not {block_size}"
        try:
            native.supported_isas()
        except NativeUnavailableError as error:
            return str(error)
        return None

    def cache_layout(self, num_blocks: int) -> CacheLayout:
        """[blocks, KV heads, elements]: a head's keys and then its values, in the order of attention_cache.h, and with
        8 bits a scale per token for each."""
        padded = -(-self.spec.head_size // _GRANULE) * _GRANULE
        elements = 2 * self.block_size * (padded + (_SCALE_BYTES if self._is_int8 else 0))
        shape = (num_blocks, self.spec.num_kv_heads, elements)
        dtype = "int8" if self._is_int8 else self.dtype
        return CacheLayout(shape, dtype, torch.Size(shape).numel() * getattr(torch, dtype).itemsize)

    def prepare(self, batch: ForwardBatch, group: int) -> Metadata:
        buffers = StepBuffers(batch.num_rows, 0)
        return Metadata(buffers.fill(batch), group, buffers, batch)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        spec = self.spec
        query, key, value = (_dense_heads(x) for x in (query, key, value))
        recording = metadata if isinstance(metadata, Recording) else None
        out = (
            recording.tape.empty(query.shape, query.dtype) if recording else torch.empty(query.shape, dtype=query.dtype)
        )
        window = spec.window if spec.kind == "window" else 0
        integers = (
            *(x.stride(0) for x in (query, key, value, out)),
            *(spec.num_heads, spec.num_kv_heads, spec.head_size),
            *(self.block_size, metadata.group, window, self._is_int8),
        )
        floats = (spec.softmax_scale, spec.softcap)
        addresses = [tensor.data_ptr() for tensor in (query, key, value, cache, out)]
        if recording:
            self.library.use_huge_pages(cache)
            recording.tape.emit(ATTENTION, query.dtype, query.shape[0], integers, floats, addresses)
        else:
            ops = (Op * 1)(make_op(ATTENTION, query.dtype, query.shape[0], integers, floats, addresses))
            self.library.run(ops, 1, metadata.step)
        return out


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_size], copied if a token's heads do not lie one after the other."""
    return x if x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2]) else x.contiguous()
