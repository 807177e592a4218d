"""Each op of a model alone, against what memory and arithmetic of this machine allow."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch

from interlace.clock import Clock, MonotonicClock
from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.checkpoint import Checkpoint, Stored
from interlace.interfaces.kernels import Kernels
from interlace.interfaces.weights import BlockWeight
from interlace.kv.specs import blocks_for
from interlace.model_config import ModelConfig
from interlace.spec import ResolvedSpec
from interlace.worker.batch import ForwardBatch
from interlace.worker.sizing import ResolvedKernels, plan_attention, plan_kernels
from interlace.worker.threads import plan_threads

ROWS = (1, 8, 64, 256)
_BEYOND_CACHES = 160 << 20
"""Bytes of weights or cache that a measurement goes around in, so that they come from memory as in a real step."""


class Peaks(msgspec.Struct, frozen=True, kw_only=True):
    """The most that this machine reached just now, by torch's own means."""

    read_gb_s: float
    gflop_s: float
    """Of a matrix product in the compute type."""


class OpResult(msgspec.Struct, frozen=True, kw_only=True):
    """One op at one shape."""

    op: str
    shape: str
    rows: int
    microseconds: float
    gb_s: float
    gflop_s: float
    percent_of_limit: float
    """The time that reading its bytes and doing its arithmetic must take, whichever is longer, of the time it took."""


class KernelReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `interlace bench kernels`."""

    model: str
    dtype: str
    threads: int
    peaks: Peaks
    selections: list[tuple[str, str, str]]
    results: list[OpResult]


class _Case(NamedTuple):
    """Something to time: `runs[i]` are equal calls on different memory."""

    op: str
    shape: str
    rows: int
    runs: Sequence[Callable[[], object]]
    bytes: float
    flops: float


def measure_kernels(
    spec: ResolvedSpec, ops: Sequence[str] = (), clock: Clock | None = None
) -> Iterator[OpResult | Peaks]:
    """The peaks, then every op (or those whose name starts with one of `ops`) at the shapes of the model."""
    clock = clock or MonotonicClock()
    torch.set_num_threads(plan_threads(spec.threads).count)
    peaks = _measure_peaks(getattr(torch, spec.dtype), clock)
    yield peaks
    for case in _cases(spec, ops):
        if ops and not case.op.startswith(tuple(ops)):
            continue
        seconds = statistics.median(_samples(case.runs, clock))
        limit = max(case.bytes / (peaks.read_gb_s * 1e9), case.flops / (peaks.gflop_s * 1e9))
        yield OpResult(
            op=case.op,
            shape=case.shape,
            rows=case.rows,
            microseconds=seconds * 1e6,
            gb_s=case.bytes / seconds / 1e9,
            gflop_s=case.flops / seconds / 1e9,
            percent_of_limit=100 * limit / seconds,
        )


def _samples(runs: Sequence[Callable[[], object]], clock: Clock) -> list[float]:
    """Seconds of one call, in samples long enough to time."""
    for run in runs[:2]:
        run()
    began = clock.now()
    runs[0]()
    rounds = max(1, round(0.005 / max(clock.now() - began, 1e-6)))
    samples = []
    turn = 0
    for _ in range(15):
        began = clock.now()
        for _ in range(rounds):
            runs[turn % len(runs)]()
            turn += 1
        samples.append((clock.now() - began) / rounds)
    return samples


def _measure_peaks(dtype: torch.dtype, clock: Clock) -> Peaks:
    big = torch.ones(64 << 20, dtype=torch.float32)  # 256 MiB
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    read = min(_samples([lambda: big.sum()], clock))
    product = min(_samples([lambda: left @ right], clock))
    return Peaks(read_gb_s=big.nbytes / read / 1e9, gflop_s=2 * 1024**3 / product / 1e9)


def _cases(spec: ResolvedSpec, ops: Sequence[str]) -> Iterator[_Case]:
    def wanted(name: str) -> bool:
        """Whether ops whose names start with `name` may be asked for: some are slow to set up."""
        return not ops or any(op.startswith(name) or name.startswith(op) for op in ops)

    kernels, _ = plan_kernels(spec)
    config, dtype = spec.model_config, getattr(torch, spec.dtype)
    if wanted("linear"):
        yield from _linears(kernels, spec, dtype)
    yield from _small_ops(kernels, config, dtype)
    if wanted("attention"):
        for backend in plan_attention(spec, spec.architecture.load()).backends:
            yield from _attention(backend, dtype)


def _linears(kernels: ResolvedKernels, spec: ResolvedSpec, dtype: torch.dtype) -> Iterator[_Case]:
    config = spec.model_config
    size, heads = config.hidden_size, config.num_heads * config.head_size
    shapes = {
        "qkv": (size, heads + 2 * config.num_kv_heads * config.head_size),
        "out": (heads, size),
        "gate_up": (size, 2 * config.intermediate_size),
        "down": (config.intermediate_size, size),
        "head": (size, config.vocab_size),
    }
    blocks = _block_format(spec.open_checkpoint()) if kernels.keeps_blocks else None
    for name, (in_size, out_size) in shapes.items():
        kept, weight_bytes, make = _linear_maker(kernels, blocks, in_size, out_size, dtype)
        linears = [make() for _ in range(max(1, _BEYOND_CACHES // weight_bytes))]
        for rows in ROWS[:3] if name == "head" else ROWS:
            x = torch.randn(rows, in_size, dtype=dtype)
            moved = weight_bytes + rows * (in_size + out_size) * dtype.itemsize
            yield _Case(
                f"linear {name}",
                f"{in_size}x{out_size} {kept}",
                rows,
                [lambda run=run, x=x: run(x) for run in linears],  # type: ignore[misc]
                moved,
                2 * rows * in_size * out_size,
            )


def _block_format(checkpoint: Checkpoint) -> tuple[BlockWeight, Stored] | None:
    """A weight in the block format that holds most of the checkpoint, and how much that is; None without blocks."""
    stored = {name: held for name, held in (checkpoint.stored() or {}).items() if held.in_blocks}
    if not stored:
        return None
    name = max(stored, key=lambda name: stored[name].values)
    weights = (weight for _, weight in checkpoint.weights() if isinstance(weight, BlockWeight))
    return next(weight for weight in weights if weight.format == name), stored[name]


def _linear_maker(
    kernels: Kernels, blocks: tuple[BlockWeight, Stored] | None, in_size: int, out_size: int, dtype: torch.dtype
) -> tuple[str, int, Callable[[], Callable[[torch.Tensor], object]]]:
    """How the weight is kept, its bytes, and what makes a linear of its own copy of it: in the checkpoint's blocks if
    rows are made of whole ones, else as plain weights are kept."""
    if blocks is not None and in_size % blocks[1].block_values == 0:
        example, stored = blocks
        row_bytes = in_size * stored.nbytes // stored.values
        data = torch.randint(0, 60, (out_size, row_bytes), dtype=torch.uint8)  # no scale is infinite or not a number
        part = msgspec.structs.replace(example, shape=(out_size, in_size), data=data)
        return part.format, part.nbytes, lambda: kernels.make_block_linear([part])
    weight = torch.randn(out_size, in_size, dtype=dtype) * 0.02
    if kernels.spec.weights == "int8":
        return "int8", in_size * out_size, lambda: kernels.make_linear(weight.clone())
    kept = kernels.spec.weight_dtype
    nbytes = in_size * out_size * int(getattr(torch, kept).itemsize)
    return kept, nbytes, lambda: kernels.make_linear(weight.clone())


def _small_ops(kernels: Kernels, config: ModelConfig, dtype: torch.dtype) -> Iterator[_Case]:
    table = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype)
    for rows in ROWS:
        yield from _small_ops_of(kernels, config, dtype, rows, table)


def _small_ops_of(
    kernels: Kernels, config: ModelConfig, dtype: torch.dtype, rows: int, table: torch.Tensor
) -> Iterator[_Case]:
    """What is no product, for `rows` tokens; `table` [vocab, hidden]."""
    size, wide, vocab, width = config.hidden_size, config.intermediate_size, config.vocab_size, dtype.itemsize
    weight = torch.ones(size, dtype=dtype)
    cos_sin = torch.randn(4096, config.head_size)
    x, residual = torch.randn(rows, size, dtype=dtype), torch.randn(rows, size, dtype=dtype)
    gate_up = torch.randn(rows, 2 * wide, dtype=dtype)
    query = torch.randn(rows, config.num_heads, config.head_size, dtype=dtype)
    key = torch.randn(rows, config.num_kv_heads, config.head_size, dtype=dtype)
    positions, ids = torch.arange(rows), torch.randint(0, vocab, (rows,))
    logits = torch.randn(rows, vocab)
    heads = f"{config.num_heads}+{config.num_kv_heads} heads"
    moved = rows * size * width
    cases: list[tuple[str, str, Callable[[], object], float]] = [
        ("rms_norm", f"{size}", lambda: kernels.rms_norm(x, weight, 1e-5, False), 2 * moved),
        ("add_rms_norm", f"{size}", lambda: kernels.add_rms_norm(x, residual, weight, 1e-5, False), 4 * moved),
        ("rope", heads, lambda: kernels.rope(query, key, positions, cos_sin), 2 * (query.nbytes + key.nbytes)),
        ("silu_mul", f"{wide}", lambda: kernels.silu_mul(gate_up), 3 * rows * wide * width),
        ("embedding", f"{size}", lambda: kernels.embedding(ids, table), 2 * moved),
        ("argmax", f"{vocab}", lambda: kernels.argmax(logits), logits.nbytes),
    ]
    for name, shape, run, nbytes in cases:
        yield _Case(name, shape, rows, [run], nbytes, 0.0)


def _attention(backend: AttentionBackend, dtype: torch.dtype) -> Iterator[_Case]:
    """Decode of one and of many sequences, and prefill."""
    for sequences, context, queries in ((1, 1024, 1), (64, 320, 1), (1, 0, 1024), (1, 1024, 512)):
        yield _attention_case(backend, dtype, sequences, context, queries)


def _attention_case(backend: AttentionBackend, dtype: torch.dtype, sequences: int, context: int, queries: int) -> _Case:
    spec = backend.spec
    length = context + queries
    per_sequence = blocks_for(length, backend.block_size)
    blocks = list(range(1, 1 + sequences * per_sequence))
    random.Random(0).shuffle(blocks)
    batch = _batch(blocks, sequences, context, queries, backend.block_size)
    layout = backend.cache_layout(len(blocks) + 1)
    copies = max(1, min(30, _BEYOND_CACHES // max(1, layout.nbytes)))
    caches = [torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype)) for _ in range(copies)]
    query = torch.randn(sequences * queries, spec.num_heads, spec.head_size, dtype=dtype)
    key = torch.randn(sequences * queries, spec.num_kv_heads, spec.head_size, dtype=dtype)
    metadata = backend.prepare(batch, 0)
    seen = min(length, spec.window or length)
    pairs = queries * (2 * context + queries + 1) / 2 if not spec.window else queries * seen
    return _Case(
        "attention",
        f"{sequences} x {queries} after {context}, {spec.kind}",
        sequences * queries,
        [lambda cache=cache: backend.forward(query, key, key, cache, metadata) for cache in caches],  # type: ignore[misc]
        sequences * layout.nbytes / (len(blocks) + 1) / backend.block_size * seen + 2 * query.nbytes,
        4 * sequences * pairs * spec.num_heads * spec.head_size,
    )


def _batch(blocks: list[int], sequences: int, context: int, queries: int, block_size: int) -> ForwardBatch:
    table = torch.tensor(blocks, dtype=torch.int32).view(sequences, -1)
    positions = torch.arange(context, context + queries).repeat(sequences)
    rows = torch.arange(sequences).repeat_interleave(queries)
    slots = table[rows, positions // block_size].long() * block_size + positions % block_size
    return ForwardBatch(
        token_ids=torch.zeros(sequences * queries, dtype=torch.int64),
        positions=positions,
        query_lens=[queries] * sequences,
        context_lens=[context] * sequences,
        block_tables=[table],
        slot_mappings=[slots],
    )
