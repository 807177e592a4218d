"""Attention `flash`: prompts through FlashAttention, as far as it is installed; decoding through the Triton kernel.

The decode kernel is the same in every case: it can be captured in a device graph and its bits do not depend on the
batch, which holds for no FlashAttention that splits keys. What takes prompts is chosen by flash_engines.py, once per
kind of layer, and logged with the reasons against the others.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field

from interlace.interfaces.attention import AttentionSpec
from interlace.plugins.attention.flash_engines import Rows, choose_engine
from interlace.plugins.attention.triton import LaunchOptions, Metadata, TritonAttention, layer_refusal
from interlace.plugins.triton import runtime
from interlace.plugins.triton.attention_plan import Array, cut_rows
from interlace.worker.batch import DecodeBatch, ForwardBatch

if TYPE_CHECKING:
    from interlace.plugins.triton.kv_cache import CacheView

logger = logging.getLogger("interlace.attention.flash")


class Prompts(NamedTuple):
    """Rows of a step that go to FlashAttention, and where their tokens are."""

    rows: Rows
    tokens: slice | torch.Tensor  # places in the batch
    blocks: torch.Tensor | None  # [keys] int64, where keys are gathered from
    offsets: torch.Tensor | None  # [keys] int64, in their blocks


class FlashMetadata(NamedTuple):
    """One step of one KV group."""

    short: Metadata  # what the decode kernel serves
    prompts: Prompts | None

    @property
    def slots(self) -> torch.Tensor:
        """Where keys and values of all tokens are written."""
        return self.short.slots


class FlashAttention(TritonAttention):
    """Rows of up to 8 tokens (as many as the decode kernel verifies) are decoded, longer ones are prompts."""

    class Options(LaunchOptions):
        """Options of the flash attention."""

        prefill: Literal["auto", "fa3", "fa2", "varlen", "sdpa"] = Field(
            default="auto",
            description="What attends for prompts: `fa3` (the package flash_attn_interface), `fa2` (the package "
            "flash_attn), `varlen` (torch.nn.attention.varlen), `sdpa` (torch's scaled_dot_product_attention, row by "
            "row), or `auto`: the first of these that can.",
        )

    def __init__(self, options: BaseModel, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> None:
        super().__init__(options, spec, block_size, dtype, device)
        engine, against = choose_engine(spec, dtype, device, self.options.prefill)
        if engine is None:
            raise ValueError(f"prefill = '{self.options.prefill}' is not possible: {'; '.join(against)}")
        self.engine = engine(spec, block_size)
        reasons = "; ".join(against)
        logger.info(
            "flash: prompts by %s%s, %s; decoding by the Triton kernel",
            self.engine.name,
            f" ({reasons})" if reasons else "",
            "reading pages" if self.engine.paged else "keys gathered from pages",
        )

    @classmethod
    def supports(cls, spec: AttentionSpec, block_size: int, dtype: str, device: str) -> str | None:
        reason = runtime.refusal(device) or runtime.dtype_refusal(dtype, device)
        if reason is not None:
            return f"its decode kernel: {reason}"
        if (reason := layer_refusal(spec, block_size)) is not None:
            return reason
        engine, against = choose_engine(spec, dtype, device)
        return None if engine is not None else f"no FlashAttention for prompts: {'; '.join(against)}"

    def prepare(self, batch: ForwardBatch, group: int) -> Any:
        query_lens, context_lens = batch.query_lens_array, batch.context_lens_array
        most = self.shape.max_verify
        decode, _ = cut_rows(query_lens, context_lens, most, 1 << 20)
        short = self._metadata(batch, group, decode, None)
        long = np.flatnonzero(query_lens > most)
        return FlashMetadata(short, self._prompts(batch, group, long) if len(long) else None)

    def prepare_decode(self, batch: DecodeBatch, group: int) -> Any:
        return FlashMetadata(super().prepare_decode(batch, group), None)

    def _attend(self, query: torch.Tensor, view: CacheView, metadata: Any) -> torch.Tensor:
        out = super()._attend(query, view, metadata.short)
        if metadata.prompts is not None:
            rows, tokens, blocks, offsets = metadata.prompts
            cache = view.data.view(-1, 2, self.spec.num_kv_heads, self.block_size, self.spec.head_size)
            if self.engine.paged:
                key, value = cache.transpose(2, 3).unbind(1)  # each [blocks, block_size, heads, head_size]
            else:
                key, value = (cache[blocks, part, :, offsets] for part in (0, 1))  # each [keys, heads, head_size]
            out[tokens] = self.engine.attend(query[tokens], key, value, rows)
        return out

    def _prompts(self, batch: ForwardBatch, group: int, long: Array) -> Prompts:
        query_lens, context_lens = batch.query_lens_array[long], batch.context_lens_array[long]
        seq_lens = query_lens + context_lens
        window = self.spec.window if self.spec.kind == "window" else 0
        first = np.maximum(context_lens - window + 1, 0) if window else np.zeros_like(context_lens)
        key_lens = seq_lens - first
        numbers = [long, seq_lens, _offsets(query_lens), _offsets(key_lens)]
        on_device = runtime.to_device(np.concatenate(numbers).astype(np.int32), self.device)
        row_ids, seq_lens_tensor, query_starts, key_starts = on_device.split([len(part) for part in numbers])  # type: ignore[no-untyped-call]
        tables = batch.block_tables[group]
        tables = tables if len(long) == len(tables) else tables[row_ids.long()]
        rows = Rows(
            *(query_starts, key_starts, seq_lens_tensor, tables),
            *(int(query_lens.max()), int((seq_lens if self.engine.paged else key_lens).max())),
            *(query_lens.tolist(), key_lens.tolist()),
        )
        tokens = self._places(_ranges((np.cumsum(batch.query_lens_array) - batch.query_lens_array)[long], query_lens))
        if self.engine.paged:
            return Prompts(rows, tokens, None, None)
        positions = _ranges(first, key_lens)
        places = np.stack((np.repeat(np.arange(len(long)), key_lens), positions // self.block_size))
        places = np.concatenate((places, positions[None] % self.block_size))
        row, block, offset = runtime.to_device(places, self.device).unbind(0)
        return Prompts(rows, tokens, tables[row, block].long(), offset)

    def _places(self, places: Array) -> slice | torch.Tensor:
        """As a slice where they are next to each other: no copies then."""
        if places[-1] - places[0] == len(places) - 1:
            return slice(int(places[0]), int(places[-1]) + 1)
        return runtime.to_device(places, self.device)


def _offsets(lengths: Array) -> Array:
    """[0, …, sum] of `lengths`."""
    return np.append(np.zeros(1, dtype=np.int64), np.cumsum(lengths))


def _ranges(starts: Array, lengths: Array) -> Array:
    """start, start + 1, … of every range, back to back."""
    before: Array = np.cumsum(lengths) - lengths
    found: Array = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return found
