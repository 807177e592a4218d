"""Starting a device runner: how much memory is left for the KV cache, measured by running the largest step there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from interlace.errors import CapacityError
from interlace.interfaces.executor import Selection
from interlace.interfaces.kernels import Kernels
from interlace.interfaces.model import ForwardContext, LayerCache, Model
from interlace.kv.specs import NULL_BLOCK, KVCacheConfig
from interlace.sampling.device import SamplingColumns, SamplingMode
from interlace.sampling.sampler import Sampler
from interlace.spec import ResolvedSpec
from interlace.worker.batch import ForwardBatch
from interlace.worker.device_batch import DeviceBatch
from interlace.worker.device_runner import DeviceRunner
from interlace.worker.graphs import Ending
from interlace.worker.memory import format_bytes
from interlace.worker.sizing import AttentionPlan, size_cache
from interlace.worker.streams import CudaStream, Stream

Allocate = Callable[[KVCacheConfig, AttentionPlan], dict[int, LayerCache]]
"""`Worker._allocate`."""

_LOWER = (
    "lower scheduler.max_num_batched_tokens (now {limits.max_num_batched_tokens}) or scheduler.max_num_seqs (now "
    "{limits.max_num_seqs})"
)


def stream_for(device: str) -> Stream | None:
    """The stream of a device that the host can run ahead of; None for the CPU."""
    found = torch.device(device)
    if found.type != "cuda":
        return None
    index = torch.cuda.current_device() if found.index is None else found.index
    return CudaStream(torch.device("cuda", index))


class Profile(msgspec.Struct, frozen=True):
    """Device memory beside weights and cache, in bytes."""

    largest_step: int
    decode_step: int
    """Of all requests, the longest as long as can be."""


def profile_memory(
    spec: ResolvedSpec,
    stream: Stream,
    model: Model,
    kernels: Kernels,
    attention: AttentionPlan,
    allocate: Allocate,
) -> Profile:
    """Run the steps that take most: a full budget of prompt tokens, and all requests decoding, one of them at the end
    of the longest sequence there can be. The weights are there, the cache is not: a few blocks stand for it, of which
    only the null block is used."""
    tiny = KVCacheConfig(
        block_size=spec.cache.block_size,
        num_blocks=1 + len(attention.groups),
        groups=attention.groups,
        bytes_per_block=0,
    )
    layers = allocate(tiny, attention)
    limits = spec.limits

    def peak(num_tokens: int, longest: int, context: int) -> int:
        full, rest = divmod(num_tokens, longest)
        lens = [longest] * full + ([rest] if rest else [])
        outputs = min(limits.max_num_seqs, num_tokens)
        try:
            return stream.peak_memory(
                lambda: _run_step(
                    stream.device, model, kernels, attention, layers, lens, context, outputs, spec.cache.block_size
                )
            )
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"a step of {num_tokens} tokens does not fit into what the weights leave free on {spec.device}, even "
                f"without a KV cache: {error}; {_LOWER.format(limits=limits)}"
            ) from error

    largest = peak(limits.max_num_batched_tokens, min(spec.max_model_len, limits.max_num_batched_tokens), 0)
    decode = peak(min(limits.max_num_seqs, limits.max_num_batched_tokens), 1, spec.max_model_len - 1)
    return Profile(largest, decode)


@torch.inference_mode()
def _run_step(
    device: torch.device,
    model: Model,
    kernels: Kernels,
    attention: AttentionPlan,
    layers: dict[int, LayerCache],
    lens: list[int],
    context: int,
    outputs: int,
    block_size: int,
) -> None:
    """A step over rows of these lengths, in the null block: the first after so many tokens of `context`, the others at
    the beginning of their sequences."""
    contexts = [context] + [0] * (len(lens) - 1)
    starts = zip(contexts, lens, strict=True)
    positions = torch.cat([torch.arange(start, start + length) for start, length in starts]).to(device)
    width = -(-(context + max(lens)) // block_size)
    batch = ForwardBatch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        query_lens=lens,
        context_lens=contexts,
        block_tables=[
            torch.full((len(lens), width), NULL_BLOCK, dtype=torch.int32, device=device) for _ in attention.groups
        ],
        slot_mappings=[positions % block_size for _ in attention.groups],
    )
    metadata: list[Any] = [backend.prepare(batch, group) for group, backend in enumerate(attention.backends)]
    hidden = model.forward(batch.token_ids, positions, ForwardContext(layers, metadata)).hidden
    logits = model.logits(hidden[:outputs].contiguous())
    ones = torch.ones(outputs, device=device)
    whole = torch.zeros(outputs, dtype=torch.int64, device=device)
    columns = SamplingColumns(ones, whole.int() + 1, ones, 0 * ones, whole, whole, whole)
    tokens = kernels.sample(logits, columns, SamplingMode.TRUNCATED)
    kernels.logprobs(logits, tokens, whole.int())


def measured_cache(
    spec: ResolvedSpec, attention: AttentionPlan, planned: KVCacheConfig, free_bytes: int, profile: Profile
) -> tuple[KVCacheConfig, Selection]:
    """The cache that fits into `free_bytes` beside what steps take, at most as large as `planned`; and how that is.

    Raises `CapacityError` if nothing fits."""
    left = free_bytes - profile.largest_step - profile.decode_step
    if left <= 0:
        raise CapacityError(
            f"nothing is left for the KV cache: {format_bytes(free_bytes)} are free on {spec.device} beside the "
            f"weights, but the largest step takes {format_bytes(profile.largest_step)} and one in which all "
            f"requests decode {format_bytes(profile.decode_step)}; {_LOWER.format(limits=spec.limits)}"
        )
    kv = size_cache(spec, attention, left)
    kv = msgspec.structs.replace(kv, num_blocks=min(kv.num_blocks, planned.num_blocks))
    size = format_bytes(kv.num_blocks * kv.bytes_per_block)
    taken = f"{format_bytes(profile.largest_step)} for the largest step, {format_bytes(profile.decode_step)} to decode"
    reason = f"{format_bytes(free_bytes)} free beside the weights; measured: {taken}"
    return kv, Selection("cache", size, reason)


def start_device_runner(
    spec: ResolvedSpec,
    stream: Stream,
    model: Model,
    layers: dict[int, LayerCache],
    attention: AttentionPlan,
    kernels: Kernels,
    kv: KVCacheConfig,
    sampler: Sampler,
    now: Callable[[], float],
) -> tuple[DeviceRunner, Selection]:
    """The runner, its largest graph captured, and how it runs steps."""
    refusals = {type(backend).__name__: backend.graph_refusal() for backend in attention.backends}
    against = "; ".join(f"{name}: {reason}" for name, reason in refusals.items() if reason is not None)
    if not spec.gpu.graphs:
        against = "gpu.graphs = false"
    limits = spec.limits
    runner = DeviceRunner(
        stream,
        model,
        layers,
        attention.backends,
        kernels,
        DeviceBatch(limits.max_num_seqs, spec.max_model_len, kv),
        sampler,
        now,
        max_tokens=limits.max_num_batched_tokens,
        max_model_len=spec.max_model_len,
        max_in_flight=spec.gpu.steps_in_flight,
        graph_sizes=None if against else spec.gpu.graph_sizes,
    )
    ahead = f"{runner.max_in_flight} steps in flight" if runner.max_in_flight > 1 else "one step at a time"
    if against:
        return runner, Selection("step", "kernel by kernel", f"{ahead}; no device graphs: {against}")
    assert runner.graphs is not None
    if runner.graphs.sizes:
        # The largest first: the smaller ones find their memory in its own, and a failure shows now.
        key = runner.graphs.key(runner.graphs.sizes[-1], spec.max_model_len, Ending(SamplingMode.GREEDY))
        assert key is not None
        with torch.inference_mode():
            runner.graphs.find(key)
    if runner.graphs.refusal is not None:
        reason = f"{ahead}; no device graphs: {runner.graphs.refusal}"
        return runner, Selection("step", "kernel by kernel", reason)
    sizes = ", ".join(map(str, runner.graphs.sizes))
    return runner, Selection("step", "device graphs", f"{ahead}; decoding of up to {sizes} rows, captured when needed")
