"""The work that configurations of the attention kernels are measured with. Needs a GPU."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch

from interlace.plugins.triton import attention, runtime
from interlace.plugins.triton.attention_config import KernelConfig, LayerShape, decode_lanes
from interlace.plugins.triton.attention_decode import Pieces
from interlace.plugins.triton.attention_plan import cut_rows
from interlace.plugins.triton.kv_cache import block_bytes, view_cache

logger = logging.getLogger("interlace.attention.triton")

_DECODE = [(1, 4095)] * 32
_PREFILL = [(4096, 0), (1024, 2048)]
"""(query tokens, tokens before them) of each sequence."""
_CACHE_BYTES = 512 << 20
"""Of blocks that sequences share if they need more: far beyond the caches of any GPU."""


Measure = Callable[[KernelConfig], float]
"""Milliseconds that a kernel takes as configured; raises what the compiler or the device says against it."""


def find_best(
    kind: str, shape: LayerShape, dtype: str, device: str, candidates: Iterable[KernelConfig]
) -> KernelConfig:
    """The fastest of `candidates` for `kind` (decode, prefill). Gives its memory back to the device, where the KV cache
    is yet to come."""
    with torch.cuda.device(device):  # kernels and events go to the current one
        best = pick_fastest(candidates, _make_measure(kind, shape, dtype, device))
        gc.collect()  # errors of those that did not run hold on to what they were measured with
        torch.cuda.empty_cache()
    return best


def pick_fastest(candidates: Iterable[KernelConfig], measure: Measure) -> KernelConfig:
    """The fastest candidate; those that fail (too much shared memory, too many registers) are left out, unless all do:
    then the last error is raised."""
    times: dict[KernelConfig, float] = {}
    failure: Exception | None = None
    for config in dict.fromkeys(candidates):
        try:
            times[config] = measure(config)
        except Exception as error:
            logger.debug("%s does not run: %s", config, error)
            failure = error
    if not times:
        raise failure or ValueError("there are no candidates")
    return min(times, key=times.__getitem__)


def _make_measure(kind: str, shape: LayerShape, dtype: str, device: str) -> Measure:
    rows = _DECODE if kind == "decode" else _PREFILL
    query_lens, context_lens = (np.array(lengths, dtype=np.int64) for lengths in zip(*rows, strict=True))
    torch_dtype: torch.dtype = getattr(torch, dtype)
    heads = shape.num_kv_heads * shape.group
    nbytes = block_bytes(shape.num_kv_heads, shape.block_size, shape.head_size, shape.is_fp8, shape.itemsize)
    longest = int((query_lens + context_lens).max())
    width = -(-longest // shape.block_size)
    num_blocks = max(width, min(len(rows) * width, _CACHE_BYTES // nbytes))
    generator = torch.Generator(device).manual_seed(0)
    cache = torch.zeros(num_blocks, nbytes, dtype=torch.int8, device=device)
    if not shape.is_fp8:
        cache = cache.view(torch_dtype).normal_(generator=generator)
    view = view_cache(cache, shape.num_kv_heads, shape.block_size, shape.head_size, shape.is_fp8)
    order = torch.randperm(len(rows) * width, generator=generator, device=device)
    tables = (order % num_blocks).to(torch.int32).view(len(rows), width)
    tokens = int(query_lens.sum())
    query = torch.randn(tokens, heads, shape.head_size, dtype=torch_dtype, device=device, generator=generator)
    out = torch.empty_like(query)

    def measure(config: KernelConfig) -> float:
        layer = attention.Layer(shape, shape.head_size**-0.5, 30.0 if shape.softcap else 0.0, config, config)
        decode, prefill = cut_rows(query_lens, context_lens, 1, shape.prefill_count(config))
        cut = decode[0] if kind == "decode" else prefill
        pieces = Pieces(*runtime.to_device(cut.array, device).unbind(0))
        slots = shape.split_slots(longest, 1)
        lanes = decode_lanes(len(rows), shape.num_kv_heads, slots, runtime.multiprocessors(device))
        work = attention.DecodeLaunch(pieces, 1, slots, lanes, 1)

        def run() -> None:
            if kind == "decode":
                attention.decode(layer, query, view, tables, work, out)
            else:
                attention.prefill(layer, query, view, tables, pieces, out)

        return time_on_device(run, device)

    return measure


def time_on_device(run: Callable[[], None], device: str, repeats: int = 10) -> float:
    """Milliseconds of one `run`, the median of several; compiles first."""
    run()
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    return float(np.median(times))
