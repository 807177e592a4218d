"""What the memory and the matrix units of this GPU give, and how near the attention kernels come to it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_jobs import Outcome, Table

from interlace.interfaces.attention import AttentionSpec
from interlace.interfaces.kernels import KernelSpec
from interlace.plugins.triton.tuning_cases import time_on_device
from interlace.sampling.device import SamplingMode
from interlace.sampling.distribution import Shape
from interlace.testing import sampling_cases
from interlace.testing.conformance import find_provider
from interlace.worker.batch import DecodeBatch, ForwardBatch

DEVICE = "cuda"
DTYPE = "bfloat16"
_VOCAB = 128256
_IN_GRAPH = 8
"""Launches per replay at least: enough that the replay itself does not count."""
_BEYOND_CACHE = 512 << 20
"""Bytes after which what was read first is in no cache of the GPU any more."""


def limits(quick: bool, values: dict[str, float]) -> Outcome:
    """Copy bandwidth and dense bf16 products: what everything after it is compared with."""
    outcome = Outcome()
    copy, read = _memory_rates((1 if quick else 4) << 30)
    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    peak = 2 * size**3 / time_on_device(lambda: a @ b, DEVICE, 20) * 1e3
    table = Table("Limits measured here", ["copy GB/s", "read GB/s", "bf16 TFLOP/s"])
    table.add(copy / 1e9, read / 1e9, peak / 1e12)
    outcome.tables.append(table)
    outcome.values.update(bandwidth=copy, peak=peak)
    return outcome


def _memory_rates(nbytes: int) -> tuple[float, float]:
    """Bytes per second of a copy (read and written) and of reading alone."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target, words = torch.empty_like(source), source.view(torch.int32)
    copy = time_on_device(lambda: target.copy_(source), DEVICE, 20)
    read = time_on_device(words.amax, DEVICE, 20)
    return 2 * nbytes / copy * 1e3, nbytes / read * 1e3


def attention(quick: bool, values: dict[str, float]) -> Outcome:
    """Decoding in bytes read, prompts in operations, over (batch, context, heads, block size)."""
    outcome = Outcome()
    bandwidth, peak = values.get("bandwidth"), values.get("peak")
    llama, narrow, wide = AttentionSpec(32, 8, 128), AttentionSpec(32, 8, 64), AttentionSpec(16, 8, 256)
    cases = [(llama, batch, context, 64) for batch, context in [(1, 16384), (1, 2048), (16, 4096), (32, 2048)]]
    if not quick:
        cases += [(llama, *sizes, 64) for sizes in [(32, 8192), (64, 2048), (64, 8192), (128, 2048), (256, 2048)]]
        cases += [(llama, 32, 4096, block) for block in (16, 32, 64, 128)]
        cases += [(spec, 32, 4096, 64) for spec in (narrow, wide, AttentionSpec(8, 8, 128), AttentionSpec(64, 8, 128))]
    decode = Table(
        "Decode attention, bf16 (backend triton)",
        ["heads", "batch", "context", "block", "kind", "us", "GB/s", "% of copy"],
    )
    outcome.tables.append(decode)
    for spec, batch, context, block in cases:
        for options in ({}, {"kv_dtype": "fp8"}) if (batch, context) == (32, 2048) else ({},):
            what = f"decode {_heads(spec)}, batch {batch}, context {context}, blocks of {block} {options}"
            try:
                seconds, nbytes = _time_decode(spec, batch, context, block, options)
            except Exception as error:
                outcome.check(what, f"{type(error).__name__}: {error}")
                continue
            kind = "fp8" if options else "bf16"
            rate = nbytes / seconds
            share = 100 * rate / bandwidth if bandwidth else None
            decode.add(_heads(spec), batch, context, block, kind, 1e6 * seconds, rate / 1e9, share)
    prefill = Table(
        "Prefill attention, bf16, blocks of 64", ["backend", "heads", "tokens", "before", "ms", "TFLOP/s", "% of peak"]
    )
    outcome.tables.append(prefill)
    for rows in ([(4096, 0)], [(1024, 0)] * 8, [(16384, 0)], [(2048, 14336)])[: 1 if quick else None]:
        for backend in ("triton", "triton_invariant", "flash"):
            try:
                seconds, operations = _time_prefill(backend, llama, rows)
            except Exception as error:
                outcome.check(f"prefill {backend}, {rows}", f"{type(error).__name__}: {error}")
                continue
            rate = operations / seconds
            tokens = f"{len(rows)} x {rows[0][0]}"
            share = 100 * rate / peak if peak else None
            prefill.add(backend, _heads(llama), tokens, rows[0][1], 1e3 * seconds, rate / 1e12, share)
    return outcome


def _heads(spec: AttentionSpec) -> str:
    return f"{spec.num_heads}/{spec.num_kv_heads} x {spec.head_size}"


def _backend(name: str, spec: AttentionSpec, block: int, options: dict[str, Any]) -> Any:
    provider = find_provider("attention", name)
    return provider(provider.Options(**options), spec, block, DTYPE, DEVICE)


def _cache(backend: Any, num_blocks: int) -> torch.Tensor:
    layout = backend.cache_layout(num_blocks)
    cache = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype), device=DEVICE)
    return cache.normal_() if cache.is_floating_point() else cache


@torch.inference_mode()
def _time_decode(
    spec: AttentionSpec, batch: int, context: int, block: int, options: dict[str, Any]
) -> tuple[float, int]:
    """Seconds of one launch in a graph, from memory and not from the GPU's caches; and the bytes it has to read."""
    backend = _backend("triton", spec, block, options)
    width = -(-context // block)
    per_block = backend.cache_layout(1).nbytes
    copies = min(64, max(1, -(-_BEYOND_CACHE // (batch * width * per_block))))
    cache = _cache(backend, 1 + copies * batch * width)
    tables = (1 + torch.randperm(copies * batch * width, device=DEVICE)).to(torch.int32).view(copies, batch, width)
    query = torch.randn(batch, spec.num_heads, spec.head_size, dtype=getattr(torch, DTYPE), device=DEVICE)
    works = []
    for table in tables:
        lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        slots = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
        buffers = DecodeBatch(lengths.long() - 1, lengths, [table], [slots], context)
        works.append(backend.prepare_decode(buffers, 0))
    view = backend._view(cache)  # without the write of the new token, which is one more, tiny launch

    def run(index: int) -> None:
        backend._attend(query, view, works[index % copies])

    return _time_in_graph(run, max(_IN_GRAPH, copies)), batch * width * per_block


def _time_in_graph(run: Callable[[int], object], count: int) -> float:
    """Seconds of one `run`, of which `count` are captured in a graph, with the numbers from 0 on."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            run(index)
    return time_on_device(graph.replay, DEVICE, 12) / 1e3 / count


@torch.inference_mode()
def _time_prefill(name: str, spec: AttentionSpec, rows: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds of one layer's `forward`, cache writes included, and its operations. `rows`: (tokens, tokens before)."""
    block = 64
    backend = _backend(name, spec, block, {})
    lens, before = ([row[part] for row in rows] for part in (0, 1))
    width = -(-max(a + b for a, b in rows) // block)
    cache = _cache(backend, 1 + len(rows) * width)
    tables = (1 + torch.arange(len(rows) * width, device=DEVICE)).to(torch.int32).view(len(rows), width)
    positions = torch.cat([torch.arange(past, past + length) for length, past in rows]).to(DEVICE)
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), lens)).to(DEVICE)
    slots = tables[owner, positions // block].long() * block + positions % block
    batch = ForwardBatch(torch.zeros_like(positions), positions, lens, before, [tables], [slots])
    tokens = sum(lens)
    heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    given = torch.randn(tokens, sum(heads), spec.head_size, dtype=getattr(torch, DTYPE), device=DEVICE)
    query, key, value = given.split(heads, dim=1)
    metadata = backend.prepare(batch, 0)
    seconds = time_on_device(lambda: backend.forward(query, key, value, cache, metadata), DEVICE, 10) / 1e3
    seen = sum(length * past + length * (length + 1) / 2 for length, past in rows)
    return seconds, 4.0 * seen * spec.num_heads * spec.head_size


def sampling(quick: bool, values: dict[str, float]) -> Outcome:
    """What choosing tokens takes, and reporting them, in a graph."""
    outcome = Outcome()
    provider = find_provider("kernels", "triton")
    kernels = provider(provider.Options(), KernelSpec(DTYPE, DEVICE))
    table = Table(f"Sampling from {_VOCAB:,} logits", ["rows", "what", "us", "GB/s of logits"])
    outcome.tables.append(table)
    ways = [
        ("greedy", Shape(0.0), SamplingMode.GREEDY),
        ("random", Shape(), SamplingMode.RANDOM),
        ("top_p 0.9", Shape(0.7, 0, 0.9), SamplingMode.TRUNCATED),
        ("top_k 50, top_p 0.9", Shape(0.7, 50, 0.9), SamplingMode.TRUNCATED),
    ]
    for rows in (1, 64) if quick else (1, 16, 64, 256):
        logits = torch.randn(rows, _VOCAB, device=DEVICE) * 3
        for name, shape, mode in ways:
            columns = sampling_cases.columns_of([shape] * rows, list(range(rows)), [0] * rows, [0] * rows, DEVICE)
            seconds = _time_calls(partial(kernels.sample, logits, columns, mode))
            table.add(rows, name, 1e6 * seconds, logits.nbytes / seconds / 1e9)
        counts = torch.full((rows,), 20, dtype=torch.int32, device=DEVICE)
        seconds = _time_calls(partial(kernels.logprobs, logits, logits.argmax(1), counts))
        table.add(rows, "20 log probabilities", 1e6 * seconds, logits.nbytes / seconds / 1e9)
    return outcome


@torch.inference_mode()
def _time_calls(call: Callable[[], object]) -> float:
    """Seconds of one call, in a graph."""
    return _time_in_graph(lambda _: call(), _IN_GRAPH)


def median(values: list[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None
