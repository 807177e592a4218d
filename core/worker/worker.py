"""`Worker`: one rank. Loads the model, allocates the KV cache, and runs steps; every executor is made of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from interlace.clock import Clock, MonotonicClock
from interlace.interfaces.checkpoint import Checkpoint
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo, Selection
from interlace.interfaces.model import LayerCache, Model
from interlace.interfaces.weights import BlockWeight, decode_all
from interlace.kv.specs import KVCacheConfig
from interlace.messages import StepPlan, StepResult
from interlace.sampling.sampler import Sampler
from interlace.spec import ResolvedSpec
from interlace.worker.memory import free_memory
from interlace.worker.model_runner import ModelRunner
from interlace.worker.persistent_batch import PersistentBatch
from interlace.worker.sizing import AttentionPlan, build_context, plan_attention, plan_kernels, plan_weights, size_cache
from interlace.worker.threads import plan_threads

OnEvent = Callable[[ExecutorEvent], None]


class Worker:
    """One rank on one device. `start` once, then `execute` in order, from one thread."""

    def __init__(self, spec: ResolvedSpec, on_event: OnEvent, clock: Clock | None = None) -> None:
        self._spec = spec
        self._on_event = on_event
        self._clock = clock or MonotonicClock()
        self._runner: ModelRunner | None = None

    def start(self, began: float | None = None) -> ExecutorInfo:
        """Choose, load, allocate. Raises with the true cause.

        `began` is when the executor started to import this module: torch takes a second that nothing else counts."""
        spec, now = self._spec, self._clock.now
        began = now() if began is None else began
        threads = plan_threads(spec.threads)
        torch.set_num_threads(threads.count)  # also what native kernels take
        model_class: type[Model] = spec.architecture.load()
        attention = plan_attention(spec, model_class)
        kernels, kernel_selections = plan_kernels(spec)
        # Sized before loading, so that an impossible cache is an error in a second and not after the weights.
        checkpoint = spec.open_checkpoint()
        needed, how_kept = plan_weights(model_class, spec, kernels, checkpoint)
        kv = size_cache(spec, attention, max(0, free_memory(spec.device) - needed))
        imported = now()
        context = build_context(spec, kernels, spec.device)
        with spec.architecture.blamed():
            model = model_class(spec.model_config, context)
        weights = self._with_progress(checkpoint)
        model.load_weights(weights if model_class.takes_blocks else decode_all(weights))
        loaded = now()
        layers = self._allocate(kv, attention)
        device = torch.device(spec.device)
        batch = PersistentBatch(spec.limits.max_num_seqs, spec.max_model_len, kv, device)
        sampler = Sampler(spec.model_config.vocab_size, self._load_processors(), now, kernels.argmax, kernels.draw)
        program = kernels.compile_step(model, layers, spec.limits.max_num_batched_tokens, spec.limits.max_num_seqs)
        if isinstance(program, str):
            step = Selection("step", "op by op", program)
            self._runner = ModelRunner(model, layers, batch, sampler, now)
        else:
            step = Selection("step", "program", program.describe())
            self._runner = ModelRunner(model, layers, batch, sampler, now, program)
            # Nothing heavy is left to torch; its threads would only wait beside ours, and busily.
            torch.set_num_threads(1)
        running = Selection("threads", str(threads.count), threads.reason)
        return ExecutorInfo(
            kv=kv,
            selections=(*attention.selections, *kernel_selections, how_kept, step, running),
            timings={"import": imported - began, "weights": loaded - imported, "cache": now() - loaded},
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; see `ModelRunner.execute`."""
        if self._runner is None:
            raise RuntimeError("the worker was not started, or was shut down")
        return self._runner.execute(plan)

    def profile(self, plan: StepPlan) -> dict[str, float]:
        """Run one step in parts; see `ModelRunner.profile`."""
        if self._runner is None:
            raise RuntimeError("the worker was not started, or was shut down")
        return self._runner.profile(plan)

    def shutdown(self) -> None:
        """Drop model and cache."""
        self._runner = None

    def _allocate(self, kv: KVCacheConfig, attention: AttentionPlan) -> list[LayerCache]:
        """One cache tensor per place in a group; layers of different groups share tensors, never blocks."""
        caches: list[torch.Tensor] = []
        for index in range(kv.num_tensors):
            backend = next(b for b, g in zip(attention.backends, kv.groups, strict=True) if index < len(g.layers))
            layout = backend.cache_layout(kv.num_blocks)
            caches.append(torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device=self._spec.device))
        layers: dict[int, LayerCache] = {}
        for number, (backend, group) in enumerate(zip(attention.backends, kv.groups, strict=True)):
            for index, layer in enumerate(group.layers):
                layers[layer] = LayerCache(backend, caches[index], number)
        return [layers[layer] for layer in sorted(layers)]

    def _with_progress(self, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor | BlockWeight]]:
        total = checkpoint.num_weights()
        for done, pair in enumerate(checkpoint.weights(), start=1):
            yield pair
            self._on_event(ExecutorEvent("progress", "loading weights", {"done": done, "total": total}))

    def _load_processors(self) -> dict[str, Any]:
        vocab_size = self._spec.model_config.vocab_size
        return {component.name: component.build(vocab_size) for component in self._spec.logits_processors}
