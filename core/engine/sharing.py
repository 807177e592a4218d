"""How replicas share a machine: threads, memory and GPUs, dealt before any of them starts."""

from __future__ import annotations

import logging

import msgspec

from interlace.spec import ResolvedSpec
from interlace.worker.threads import plan_threads

logger = logging.getLogger("interlace.engine")


def share_machine(spec: ResolvedSpec, count: int, num_gpus: int | None = None) -> list[ResolvedSpec]:
    """One spec for each of `count` replicas on this machine.

    On CPU each gets an equal part of the threads (at least one); processors that executors bind to are dealt by them,
    as `part` and `num_parts` say. Replicas on one device, as all are on CPU, share its
    KV cache memory: `cache.memory` is a device's. GPUs are dealt in turns where `device` names none, as many to a
    replica as its executor has ranks (its options `tensor_parallel` and `pipeline_parallel`). `num_gpus`: how many
    there are, asked of torch by default."""
    devices = _deal_devices(spec, count, num_gpus)
    threads = _deal_threads(spec, count) if spec.device == "cpu" else [spec.threads] * count
    specs = []
    for index in range(count):
        sharers = devices.count(devices[index])
        memory = spec.cache.memory_bytes
        cache = msgspec.structs.replace(
            spec.cache,
            memory_bytes=None if memory is None else memory // sharers,
            memory_share=spec.cache.memory_share / sharers,
        )
        shared = msgspec.structs.replace(
            spec, part=index, num_parts=count, device=devices[index], threads=threads[index], cache=cache
        )
        specs.append(msgspec.structs.replace(shared, replica=index, num_replicas=count))
    return specs


def number(spec: ResolvedSpec, count: int) -> list[ResolvedSpec]:
    """One spec for each of `count` replicas that do not share this machine; where they run settles the rest."""
    return [msgspec.structs.replace(spec, replica=index, num_replicas=count) for index in range(count)]


def describe_shares(specs: list[ResolvedSpec]) -> str:
    """For the report of the start: who has what."""
    first = specs[0]
    if first.device == "cpu":
        counts = sorted({spec.threads for spec in specs})
        words = " or ".join(str(count) for count in counts)
        return f"{words} thread{'' if counts == [1] else 's'} each, KV cache memory shared"
    return "on " + ", ".join(spec.device for spec in specs)


def _deal_threads(spec: ResolvedSpec, count: int) -> list[int]:
    plan = plan_threads(spec.threads)
    if plan.count < count:
        logger.warning(
            "engine.replicas = %d, but there are only %d threads (%s): replicas will wait for each other's processors",
            count,
            plan.count,
            plan.reason,
        )
    return [max(1, plan.count * (index + 1) // count - plan.count * index // count) for index in range(count)]


def _deal_devices(spec: ResolvedSpec, count: int, num_gpus: int | None) -> list[str]:
    if spec.device != "cuda":
        return [spec.device] * count
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    options = spec.executor.options
    ranks = int(options.get("tensor_parallel", 1)) * int(options.get("pipeline_parallel", 1))
    places = num_gpus // ranks
    if not places:  # the executor says what is wrong
        return [spec.device] * count
    return [f"cuda:{index % places * ranks}" for index in range(count)]
