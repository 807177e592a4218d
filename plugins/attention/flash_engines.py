"""The FlashAttention implementations that `flash` can give prompts to, and what each of them can and must not be given.

An engine attends for some rows of a batch, whose queries lie back to back. All align the causal mask to the last key:
the last query of a row sees all its keys. No engine may split keys (`num_splits` 1 where there is a choice): how many
splits are taken would depend on the rest of the batch, and with pages FlashAttention 2 gets split keys wrong
(flash-attention#1217, pytorch#194167).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from interlace.interfaces.attention import AttentionSpec

_FA2_PAGE = 256
"""FlashAttention 2 reads pages of a multiple of this many tokens only."""
_HOPPER = 9


class Rows(NamedTuple):
    """The rows of a step that an engine serves."""

    query_starts: torch.Tensor  # [rows + 1] int32, offsets in the queries
    key_starts: torch.Tensor  # [rows + 1] int32, offsets in gathered keys
    seq_lens: torch.Tensor  # [rows] int32
    tables: torch.Tensor  # [rows, max_blocks] int32
    max_query_len: int
    max_key_len: int
    query_lens: list[int]
    key_lens: list[int]  # gathered


class Engine(ABC):
    """One implementation, for layers of one kind."""

    name: ClassVar[str]
    paged: bool = False
    """Whether it reads pages by itself; else keys and values are gathered for it."""

    def __init__(self, spec: AttentionSpec, block_size: int) -> None:
        self._spec = spec
        self._block_size = block_size
        # A window of (left, right) keys beside a token's own; -1: all.
        self._window = (spec.window - 1 if spec.kind == "window" else -1, 0)

    @classmethod
    @abstractmethod
    def refusal(cls, spec: AttentionSpec, dtype: str, device: str) -> str | None:
        """None if it can serve such layers here, else the reason against, as a clause."""

    @abstractmethod
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        """`query` [tokens, heads, head_size] of `rows` -> the same shape. `key`, `value`: if `paged` the cache,
        [blocks, block_size, kv_heads, head_size] with any strides but a dense last dimension; else [keys, kv_heads,
        head_size]."""


class FlashAttention3(Engine):
    """The flash_attn_interface package, which reads pages of any size."""

    name = "flash-attn 3"
    paged = True

    def __init__(self, spec: AttentionSpec, block_size: int) -> None:
        super().__init__(spec, block_size)
        self._call: Callable[..., Any] = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache

    @classmethod
    def refusal(cls, spec: AttentionSpec, dtype: str, device: str) -> str | None:
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "the package flash_attn_interface is not installed"
        return _kernel_refusal(spec, dtype, device, exactly=_HOPPER)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        out: torch.Tensor = self._call(
            query,
            key,
            value,
            cache_seqlens=rows.seq_lens,
            page_table=rows.tables,
            cu_seqlens_q=rows.query_starts,
            max_seqlen_q=rows.max_query_len,
            softmax_scale=self._spec.softmax_scale,
            causal=True,
            window_size=self._window,
            softcap=self._spec.softcap,
            num_splits=1,
        )
        return out


class FlashAttention2(Engine):
    """The flash_attn package. Pages of a multiple of 256 tokens it reads itself."""

    name = "flash-attn 2"

    def __init__(self, spec: AttentionSpec, block_size: int) -> None:
        super().__init__(spec, block_size)
        self._call: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
        self.paged = block_size % _FA2_PAGE == 0

    @classmethod
    def refusal(cls, spec: AttentionSpec, dtype: str, device: str) -> str | None:
        if importlib.util.find_spec("flash_attn") is None:
            return "the package flash_attn is not installed"
        return _kernel_refusal(spec, dtype, device)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        key_starts, paging = rows.key_starts, {}
        if self.paged:
            # Lengths come from here also where keys lie in pages.
            key_starts = torch.nn.functional.pad(rows.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
            paging = {"block_table": rows.tables}
        out: torch.Tensor = self._call(
            query,
            key,
            value,
            rows.query_starts,
            key_starts,
            rows.max_query_len,
            rows.max_key_len,
            softmax_scale=self._spec.softmax_scale,
            causal=True,
            window_size=self._window,
            softcap=self._spec.softcap,
            **paging,
        )
        return out


class TorchVarlen(Engine):
    """torch's own varlen attention. Never with a block table: with FlashAttention 2 inside, pages of less than 256
    tokens are an error and split keys are wrong."""

    name = "torch.nn.attention.varlen"

    def __init__(self, spec: AttentionSpec, block_size: int) -> None:
        super().__init__(spec, block_size)
        self._call, parameters = _varlen()
        self._repeats = spec.num_heads // spec.num_kv_heads
        self._arguments: dict[str, Any] = {"scale": spec.softmax_scale}
        if "window_size" in parameters:
            self._arguments["window_size"] = self._window
        else:
            self._arguments["is_causal"] = True
        if "num_splits" in parameters:
            self._arguments["num_splits"] = 1
        self._groups = "enable_gqa" in parameters
        if self._groups and self._repeats > 1:
            self._arguments["enable_gqa"] = True

    @classmethod
    def refusal(cls, spec: AttentionSpec, dtype: str, device: str) -> str | None:
        call, parameters = _varlen()
        if call is None:
            return f"torch {torch.__version__} has no varlen attention"
        if spec.softcap:
            return "it knows no soft cap"
        if "scale" not in parameters and spec.scale:
            return f"that of torch {torch.__version__} takes no scale"
        if spec.kind == "window" and "window_size" not in parameters:
            return f"that of torch {torch.__version__} knows no window"
        return _kernel_refusal(spec, dtype, device)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        if not self._groups and self._repeats > 1:
            key, value = (x.repeat_interleave(self._repeats, 1) for x in (key, value))
        lengths = (rows.query_starts, rows.key_starts, rows.max_query_len, rows.max_key_len)
        out: torch.Tensor = self._call(query, key, value, *lengths, **self._arguments)
        return out


class TorchSdpa(Engine):
    """torch's scaled dot product attention, row by row. On any device."""

    name = "torch's scaled_dot_product_attention"

    @classmethod
    def refusal(cls, spec: AttentionSpec, dtype: str, device: str) -> str | None:
        if spec.softcap:
            return "it knows no soft cap"
        if spec.kind == "window":
            return "it knows no window"
        return None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: Rows) -> torch.Tensor:
        from torch.nn.attention.bias import causal_lower_right

        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        grouped = query.shape[1] != key.shape[1]
        at = seen = 0
        for queries, keys in zip(rows.query_lens, rows.key_lens, strict=True):
            parts = (query[at : at + queries], key[seen : seen + keys], value[seen : seen + keys])
            row_query, row_key, row_value = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            bias: torch.Tensor | None = None
            if queries != keys:
                # On the CPU the mask that needs no memory is no faster than one that does, and knows no groups.
                on_cpu = query.device.type == "cpu"
                whole = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if on_cpu else None
                bias = causal_lower_right(queries, keys) if whole is None else whole
            result = scaled_dot_product_attention(
                row_query,
                row_key,
                row_value,
                bias,
                is_causal=bias is None,
                scale=self._spec.softmax_scale,
                enable_gqa=grouped,
            )
            out[at : at + queries] = result.squeeze(0).transpose(0, 1)
            at, seen = at + queries, seen + keys
        return out


ENGINES: dict[str, type[Engine]] = {
    "fa3": FlashAttention3,
    "fa2": FlashAttention2,
    "varlen": TorchVarlen,
    "sdpa": TorchSdpa,
}
"""Best first, by what the option `prefill` calls them."""


def choose_engine(
    spec: AttentionSpec, dtype: str, device: str, wanted: str = "auto"
) -> tuple[type[Engine] | None, list[str]]:
    """(the first engine of those `wanted` that can serve such layers, why not the ones before it)."""
    against: list[str] = []
    for name, engine in ENGINES.items():
        if wanted in ("auto", name):
            reason = engine.refusal(spec, dtype, device)
            if reason is None:
                return engine, against
            against.append(f"not {engine.name}: {reason}")
    return None, against


def _kernel_refusal(spec: AttentionSpec, dtype: str, device: str, exactly: int | None = None) -> str | None:
    """What all FlashAttention kernels have in common; `exactly`: the major compute capability they are built for."""
    if torch.device(device).type != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if spec.head_size % 8 or spec.head_size > 256:
        return f"head sizes are multiples of 8 up to 256, not {spec.head_size}"
    if exactly is not None:
        major = torch.cuda.get_device_capability(torch.device(device))[0]
        if major != exactly:
            return f"it is made for GPUs of compute capability {exactly}.x, {device} has {major}.x"
    return None


def _varlen() -> tuple[Any, frozenset[str]]:
    """torch's varlen attention and the names of its parameters; (None, none) where there is none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None, frozenset()
    call = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return call, frozenset(inspect.signature(call).parameters)
