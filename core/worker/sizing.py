"""Choices a worker makes before it loads anything: attention backend, kernels, KV groups, number of blocks.

The same functions serve `interlace config plan`, so what it prints is what a start does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from interlace.errors import CapacityError, ConfigError, PluginError
from interlace.interfaces.attention import AttentionBackend, AttentionSpec
from interlace.interfaces.checkpoint import Checkpoint, Stored
from interlace.interfaces.executor import Executor, Selection
from interlace.interfaces.kernels import GPU_OPS, OPS, Kernels, KernelSpec
from interlace.interfaces.model import BuildContext, Model, Parallel
from interlace.kv.specs import KVCacheConfig, KVGroup, blocks_for, group_layers
from interlace.spec import Component, ResolvedSpec
from interlace.worker.memory import format_bytes, free_memory
from interlace.worker.place import Place

logger = logging.getLogger("interlace.worker")

NOT_INVARIANT = "not batch-invariant, which deterministic = true demands"


class AttentionPlan(msgspec.Struct, frozen=True):
    """The attention side of a worker: one backend per KV group."""

    specs: list[AttentionSpec]
    """Per layer of the whole model, as this rank sees it."""
    groups: tuple[KVGroup, ...]
    """Of the whole model, and so the same on all ranks: block tables are."""
    backends: list[AttentionBackend]
    """Per group."""
    layers_here: list[list[int]]
    """Per group: its layers on this rank's pipeline stage. Layer `layers_here[g][j]` keeps its data in tensor `j`."""
    selections: tuple[Selection, ...]


class RankPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank will hold."""

    place: Place
    layers: range
    """Attention layers of its stage."""
    num_heads: int
    num_kv_heads: int
    """Of the first of these layers."""
    weights_bytes: int
    kv_bytes: int
    free_bytes: int
    """Its part of the memory that is free where it runs."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a start will take, before it takes it; the bytes are those of all ranks together."""

    weights_bytes: int
    kv_bytes: int
    free_bytes: int
    kv: KVCacheConfig
    selections: tuple[Selection, ...]
    ranks: tuple[RankPlan, ...]

    @property
    def num_blocks(self) -> int:
        return self.kv.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens that fit if every KV group were needed in full (windows need less)."""
        return (self.kv.num_blocks - 1) // max(1, len(self.kv.groups)) * self.kv.block_size


def _auto_refusal(component: Component, target: Any, device: str) -> str | None:
    reason: str | None = target.auto_refusal(device) if component.automatic else None
    return reason


def _choose(kind: str, candidates: tuple[Component, ...], what: str, device: str, ask: Any) -> tuple[Component, str]:
    """The first candidate whose class gives no reason against; the reason names what the others said."""
    against: list[str] = []
    for component in candidates:
        target = component.load()
        with component.blamed():
            reason = _auto_refusal(component, target, device) or ask(target)
        if reason is None:
            why = component.reason if not against else f"{component.reason}; {'; '.join(against)}"
            return component, why
        against.append(f"not {component.name}: {reason}")
    raise PluginError(f"no {kind} provider can serve {what}: {'; '.join(against)}. Set {kind}.use to another one.")


def check_pipeline(spec: ResolvedSpec, model: type[Model], parallel: Parallel) -> None:
    """Raise `ConfigError` if the model cannot be cut into that many pipeline stages."""
    stages, layers = parallel.num_stages, spec.model_config.num_layers
    if stages > 1 and not model.supports_pipeline:
        raise ConfigError(
            f"executor option pipeline_parallel = {stages}, but the model {spec.architecture.name} cannot be cut "
            "into stages (supports_pipeline is false); set it to 1 and raise tensor_parallel instead"
        )
    if stages > layers:
        raise ConfigError(
            f"executor option pipeline_parallel = {stages}, but the model has {layers} layers and each stage needs "
            f"one; set it to {layers} at most"
        )


def plan_attention(spec: ResolvedSpec, model: type[Model], parallel: Parallel | None = None) -> AttentionPlan:
    """Group the layers and choose a backend for each group. Raises `PluginError` if none supports it."""
    parallel = parallel or Parallel()
    specs = model.attention_specs(spec.model_config, parallel.size, parallel.rank)
    groups = group_layers([layer.kv_key for layer in specs])
    stage = parallel.layers_here(len(specs))
    backends: list[AttentionBackend] = []
    selections: dict[Selection, None] = {}
    block_size = spec.cache.block_size
    for group in groups:
        layer = specs[group.layers[0]]
        component, why = _choose(
            "attention",
            spec.attention,
            f"{layer.kind} attention of head size {layer.head_size}",
            spec.device,
            lambda target, layer=layer: _attention_refusal(target, layer, spec),
        )
        backends.append(component.build(layer, block_size, spec.dtype, spec.device))
        selections[Selection("attention", component.name, why)] = None
    here = [[layer for layer in group.layers if layer in stage] for group in groups]
    return AttentionPlan(specs, groups, backends, here, tuple(selections))


def _attention_refusal(target: type[AttentionBackend], layer: AttentionSpec, spec: ResolvedSpec) -> str | None:
    if spec.deterministic and not target.batch_invariant:
        return NOT_INVARIANT
    return target.supports(layer, spec.cache.block_size, spec.dtype, spec.device)


class ResolvedKernels(Kernels):
    """Each op bound to the provider that won it; the reference of the base class where none did.

    Step programs are asked of the provider of linears: it sees for itself whether all else can be part of one."""

    def __init__(self, spec: KernelSpec, ops: dict[str, Any]) -> None:
        super().__init__(Kernels.Options(), spec)
        self.__dict__.update(ops)
        if "make_linear" in ops:
            self.__dict__["compile_step"] = ops["make_linear"].__self__.compile_step

    def rounds_inputs(self, op: str) -> bool:
        made_by = self.__dict__.get(op)
        return super().rounds_inputs(op) if made_by is None else bool(made_by.__self__.rounds_inputs(op))

    @property
    def keeps_blocks(self) -> bool:
        """Whether blocks stay blocks: a provider computes with them, and they are not to be decoded."""
        return self.spec.keeps_blocks and "make_block_linear" in self.__dict__


def plan_kernels(spec: ResolvedSpec) -> tuple[ResolvedKernels, tuple[Selection, ...]]:
    """Resolve every op: the first candidate that has its own and supports it, else the reference."""
    kernel_spec = KernelSpec(spec.dtype, spec.device, spec.weights, spec.deterministic)
    candidates = [(component, component.load()) for component in spec.kernels]
    providers: dict[str, Kernels] = {}  # built when they win an op: what cannot run here is not built
    ops: dict[str, Any] = {}
    won: dict[str, dict[str, list[str]]] = {}  # provider → how it runs them → ops
    against: dict[str, dict[str, list[str]]] = {}  # provider → its reason → ops
    for op in OPS:
        for component, target in candidates:
            if not _has_own(target, op):
                continue
            with component.blamed():
                reason = _auto_refusal(component, target, spec.device) or _op_refusal(target, op, kernel_spec)
            if reason is None:
                if component.name not in providers:
                    providers[component.name] = component.build(kernel_spec)
                provider = providers[component.name]
                ops[op] = getattr(provider, op)
                won.setdefault(component.name, {}).setdefault(provider.describe(op), []).append(op)
                break
            against.setdefault(component.name, {}).setdefault(reason, []).append(op)
    left = [op for op in OPS if op not in ops]
    _check_reference(left, kernel_spec, _against_in_words(against, candidates, left))
    for component, target in candidates:
        if not any(_has_own(target, op) for op in OPS):
            component.build(kernel_spec)  # it has nothing to win, but what is wrong with it must be said
        elif component.name not in providers and not component.automatic:
            reasons = "; ".join(_against_in_words(against, candidates, OPS))
            raise PluginError(f"no op can run on the kernels asked for: {reasons}. Set kernels.use to another one.")
    is_cpu = torch.device(spec.device).type == "cpu"
    reference = [op for op in left if not (is_cpu and op in GPU_OPS)]
    selections = [Selection("kernels", name, _ops_in_words(ways)) for name, ways in won.items()]
    if reference:
        why = "; ".join([", ".join(reference), *_against_in_words(against, candidates, reference)])
        selections.append(Selection("kernels", "reference", why))
    return ResolvedKernels(kernel_spec, ops), tuple(selections)


def _has_own(target: Any, op: str) -> bool:
    return getattr(target, op) is not getattr(Kernels, op)


def _against_in_words(
    against: dict[str, dict[str, list[str]]], candidates: list[tuple[Component, Any]], ops: Sequence[str]
) -> list[str]:
    """Why not which provider for `ops`; a reason against all that a provider has is told without their names."""
    told = []
    for component, target in candidates:
        for reason, refused in against.get(component.name, {}).items():
            if concerned := [op for op in refused if op in ops]:
                is_all = len(refused) == sum(_has_own(target, op) for op in OPS)
                what = "" if is_all else f" for {', '.join(concerned)}"
                told.append(f"not {component.name}{what}: {reason}")
    return told


def _ops_in_words(ways: dict[str, list[str]]) -> str:
    """How ops are run → the ops, as `a, b (how); c (how else)`."""
    return "; ".join(", ".join(ops) + (f" ({how})" if how else "") for how, ops in ways.items())


def _op_refusal(target: type[Kernels], op: str, spec: KernelSpec) -> str | None:
    if spec.deterministic and op not in target.batch_invariant:
        return NOT_INVARIANT
    return target.supports(op, spec)


def _check_reference(left: list[str], spec: KernelSpec, against: list[str]) -> None:
    """Raise `PluginError` if ops that no provider won cannot be left to the reference."""
    refused = {op: reason for op in left if (reason := _op_refusal(Kernels, op, spec)) is not None}
    if refused:
        cure = "deterministic = false" if NOT_INVARIANT in refused.values() else "weights = 'auto'"
        details = "; ".join([*against, *(f"not the reference for {op}: {reason}" for op, reason in refused.items())])
        raise PluginError(f"no kernels can run {', '.join(refused)} as asked: {details}. Set {cure}, or kernels.use")


def build_context(
    spec: ResolvedSpec,
    kernels: ResolvedKernels,
    device: str,
    parallel: Parallel | None = None,
    stored: Mapping[str, Stored] | None = None,
) -> BuildContext:
    """What the model is built with on `device` (`meta`: shapes only); `stored`: what `Checkpoint.stored` says."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    context = BuildContext(kernels, parallel or Parallel(), dtype, torch.device(device), spec.max_model_len)
    blocks = [held.block_values for held in (stored or {}).values() if held.in_blocks and kernels.keeps_blocks]
    ops = ("make_linear", "make_block_linear") if blocks else ("make_linear",)
    if spec.deterministic or any(kernels.rounds_inputs(op) for op in ops):
        return context._replace(gather=True)  # no linear is cut along its inputs, so there is no grain to keep
    return context._replace(grain=max(blocks, default=1))


def size_cache(spec: ResolvedSpec, attention: AttentionPlan, free_bytes: int) -> KVCacheConfig:
    """How many blocks fit the memory budget. Raises `CapacityError` stating needed, available and the key."""
    layouts = [backend.cache_layout(2) for backend in attention.backends]
    tensors = max(map(len, attention.layers_here), default=0)
    bytes_per_block = tensors * max((layout.nbytes for layout in layouts), default=0) // 2
    budget = spec.cache.memory_bytes
    if budget is None:
        budget = int(free_bytes * spec.cache.memory_share)
    elif budget > free_bytes:
        raise CapacityError(
            f"cache.memory asks for {format_bytes(budget)}, but only {format_bytes(free_bytes)} are free on "
            f"{spec.device}; lower cache.memory"
        )
    num_groups = max(1, len(attention.groups))
    block_size = spec.cache.block_size
    largest = blocks_for(spec.max_model_len, block_size) * num_groups
    most = 1 + largest * spec.limits.max_num_seqs  # more could never be used
    room = budget // bytes_per_block if bytes_per_block else most  # a stage may have no attention layer
    num_blocks = min(room, most, spec.cache.max_blocks or most)
    least = 1 + num_groups
    if num_blocks < least:
        raise CapacityError(
            f"the KV cache needs at least {format_bytes(least * bytes_per_block)} ({least} blocks of "
            f"{format_bytes(bytes_per_block)}), available are {format_bytes(budget)}; raise cache.memory"
        )
    return KVCacheConfig(
        block_size=block_size, num_blocks=num_blocks, groups=attention.groups, bytes_per_block=bytes_per_block
    )


def warn_if_short(spec: ResolvedSpec, kv: KVCacheConfig) -> None:
    """Say it if the cache cannot hold one request of the greatest length."""
    num_groups = max(1, len(kv.groups))
    largest = blocks_for(spec.max_model_len, kv.block_size) * num_groups
    if kv.num_blocks - 1 < largest:
        logger.warning(
            "the KV cache holds %d tokens, less than max_model_len = %d: a longer request ends with a kv_capacity "
            "error; raise cache.memory (now %s) or lower max_model_len",
            (kv.num_blocks - 1) // num_groups * kv.block_size,
            spec.max_model_len,
            format_bytes(kv.num_blocks * kv.bytes_per_block),
        )


def plan_memory(spec: ResolvedSpec) -> MemoryPlan:
    """Everything a start would choose and take, on each rank, without reading a weight or allocating a block."""
    executor: Executor = spec.executor.build()
    places = executor.places(spec)
    plans = [_plan_rank(spec, place) for place in places]
    num_blocks = min(kv.num_blocks for _, kv, _ in plans)  # as ranks agree
    ranks = tuple(msgspec.structs.replace(rank, kv_bytes=num_blocks * kv.bytes_per_block) for rank, kv, _ in plans)
    kv = msgspec.structs.replace(
        plans[0][1], num_blocks=num_blocks, bytes_per_block=sum(kv.bytes_per_block for _, kv, _ in plans)
    )
    warn_if_short(spec, kv)
    return MemoryPlan(
        weights_bytes=sum(rank.weights_bytes for rank in ranks),
        kv_bytes=sum(rank.kv_bytes for rank in ranks),
        free_bytes=sum(rank.free_bytes for rank in ranks),
        kv=kv,
        selections=tuple(dict.fromkeys(choice for _, _, selections in plans for choice in selections)),
        ranks=ranks,
    )


def _plan_rank(spec: ResolvedSpec, place: Place) -> tuple[RankPlan, KVCacheConfig, tuple[Selection, ...]]:
    """One rank's part, its KV cache as it would be if the rank were asked alone, and its choices."""
    spec = msgspec.structs.replace(spec, device=place.device) if place.device else spec
    parallel = Parallel()
    parallel.rank, parallel.size = place.tensor_rank, place.tensor_size
    parallel.stage, parallel.num_stages, parallel.stage_layers = place.stage, place.num_stages, place.stage_layers
    model_class = spec.architecture.load()
    check_pipeline(spec, model_class, parallel)
    attention = plan_attention(spec, model_class, parallel)
    kernels, kernel_selections = plan_kernels(spec)
    weights, how = plan_weights(model_class, spec, kernels, spec.open_checkpoint(), parallel)
    free = free_memory(spec.device) // place.sharers
    kv = size_cache(spec, attention, max(0, free - weights))
    layers = parallel.layers_here(len(attention.specs))
    first = attention.specs[layers.start] if layers else None
    rank = RankPlan(
        place=place,
        layers=layers,
        num_heads=first.num_heads if first else 0,
        num_kv_heads=first.num_kv_heads if first else 0,
        weights_bytes=weights,
        kv_bytes=0,  # until all agree on the blocks
        free_bytes=free,
    )
    return rank, kv, (*attention.selections, *kernel_selections, how)


def plan_weights(
    model_class: type[Model],
    spec: ResolvedSpec,
    kernels: ResolvedKernels,
    checkpoint: Checkpoint,
    parallel: Parallel | None = None,
) -> tuple[int, Selection]:
    """(bytes of the weights as this rank keeps them, how that is), from the checkpoint's table and a model without
    storage. Of several ranks, each is reckoned to hold its share of every block format alike."""
    stored = checkpoint.stored() or {}
    num_parameters = whole = _count_parameters(model_class, spec, kernels, stored, Parallel())
    if parallel is not None and parallel.size * parallel.num_stages > 1:
        num_parameters = _count_parameters(model_class, spec, kernels, stored, parallel)
    part = num_parameters / max(1, whole)
    blocks = {name: held for name, held in stored.items() if held.in_blocks}
    itemsize = 1 if spec.weights == "int8" else getattr(torch, kernels.spec.weight_dtype).itemsize
    name = "int8" if spec.weights == "int8" else kernels.spec.weight_dtype
    if not (blocks and kernels.keeps_blocks and model_class.takes_blocks):
        size = num_parameters * itemsize
        origin = f", decoded from {', '.join(sorted(blocks))}" if blocks else ""
        return size, Selection("weights", name, f"{format_bytes(size)}{origin}")
    kept = {block_name: int(held.nbytes * part) for block_name, held in blocks.items()}
    kept[name] = int(max(0, whole - sum(held.values for held in blocks.values())) * part) * itemsize
    parts = ", ".join(f"{part_name} {format_bytes(size)}" for part_name, size in kept.items() if size)
    return sum(kept.values()), Selection("weights", "as shipped", parts)


def _count_parameters(
    model_class: type[Model],
    spec: ResolvedSpec,
    kernels: ResolvedKernels,
    stored: Mapping[str, Stored],
    parallel: Parallel,
) -> int:
    context = build_context(spec, kernels, "meta", parallel, stored)
    with spec.architecture.blamed():
        return model_class(spec.model_config, context).num_parameters
