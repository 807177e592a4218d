"""`Worker`: one rank. Loads the model, allocates the KV cache, and runs steps; every executor is made of these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import msgspec
import torch

from interlace.clock import Clock, MonotonicClock
from interlace.interfaces.checkpoint import Checkpoint
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo, Selection
from interlace.interfaces.kernels import StepProgram
from interlace.interfaces.model import LayerCache, Model, Parallel
from interlace.interfaces.weights import BlockWeight, decode_all
from interlace.kv.specs import KVCacheConfig
from interlace.messages import SampledTokens, StepPlan, StepResult
from interlace.sampling.sampler import Sampler
from interlace.spec import ResolvedSpec
from interlace.worker.device_runner import DeviceRunner
from interlace.worker.device_start import measured_cache, profile_memory, start_device_runner, stream_for
from interlace.worker.memory import free_memory
from interlace.worker.model_runner import ModelRunner
from interlace.worker.persistent_batch import PersistentBatch
from interlace.worker.place import Place
from interlace.worker.sizing import (
    AttentionPlan,
    ResolvedKernels,
    build_context,
    check_pipeline,
    plan_attention,
    plan_kernels,
    plan_weights,
    size_cache,
    warn_if_short,
)
from interlace.worker.streams import Stream
from interlace.worker.threads import bind, plan_threads

logger = logging.getLogger("interlace.worker")

OnEvent = Callable[[ExecutorEvent], None]


class _Choices(NamedTuple):
    """What `Worker.prepare` settled."""

    model_class: type[Model]
    attention: AttentionPlan
    kernels: ResolvedKernels
    checkpoint: Checkpoint
    kv: KVCacheConfig
    selections: tuple[Selection, ...]
    threads: int
    began: float
    imported: float


class Worker:
    """One rank on one device. `start` once, then `execute` in order, from one thread.

    An executor of several ranks makes each with its `place` and `parallel`, and agrees on the number of KV blocks:
    `prepare` all of them, take the least of what they return, then `start` all with it. All ranks are given every plan,
    and `sampled` with it (`interlace.worker.feedback`); the result of the rank that samples is the step's.
    """

    def __init__(
        self,
        spec: ResolvedSpec,
        on_event: OnEvent,
        clock: Clock | None = None,
        place: Place | None = None,
        parallel: Parallel | None = None,
        stream: Stream | None = None,
    ) -> None:
        """`place` and `parallel` say the same of this rank; by default it is the only one. `stream`: the device to run
        ahead of; by default that of the GPU, if the only rank is on one."""
        self.place = place or Place()
        self._parallel = parallel or Parallel()
        self._spec = msgspec.structs.replace(spec, device=self.place.device) if self.place.device else spec
        self._stream = stream
        self._on_event = on_event
        self._clock = clock or MonotonicClock()
        self._choices: _Choices | None = None
        self._runner: ModelRunner | None = None

    def prepare(self, began: float | None = None) -> int:
        """Choose everything, load nothing: the most KV blocks this rank has room for. Raises with the true cause.

        Ranks that share memory are to prepare before any of them starts: each counts on its part of what is free now.
        `began` is when the executor started to import this module: torch takes a second that nothing else counts."""
        spec = self._spec
        began = self._clock.now() if began is None else began
        bind(self.place.cores)
        threads = plan_threads(self.place.threads or spec.threads)
        if threads.is_crowded:
            logger.warning("%d %s: each step waits for those without a core", threads.count, threads.reason)
        torch.set_num_threads(threads.count)  # also what native kernels take
        model_class: type[Model] = spec.architecture.load()
        check_pipeline(spec, model_class, self._parallel)
        attention = plan_attention(spec, model_class, self._parallel)
        kernels, kernel_selections = plan_kernels(spec)
        # While loading, torch works in pieces too small to share; after each, its other threads would wait for the next
        # one busily, where native kernels want to pack weights.
        torch.set_num_threads(1)
        # Sized before loading, so that an impossible cache is an error in a second and not after the weights.
        checkpoint = spec.open_checkpoint()
        needed, how_kept = plan_weights(model_class, spec, kernels, checkpoint, self._parallel)
        free = free_memory(spec.device) // self.place.sharers
        kv = size_cache(spec, attention, max(0, free - needed))
        running = Selection("threads", str(threads.count), threads.reason)
        selections = (*attention.selections, *kernel_selections, how_kept, running)
        imported = self._clock.now()
        self._choices = _Choices(
            model_class, attention, kernels, checkpoint, kv, selections, threads.count, began, imported
        )
        return kv.num_blocks

    def start(self, began: float | None = None, num_blocks: int | None = None) -> ExecutorInfo:
        """Load and allocate, with `num_blocks` KV blocks (default: as many as `prepare` found); `prepare` comes first
        by itself. Raises with the true cause.

        With several ranks the weights are loaded without exchanging anything: a rank that fails here fails alone, and
        its executor ends the others. The `bytes_per_block` of the answer are this rank's."""
        if self._choices is None:
            self.prepare(began)
        chosen, self._choices = self._choices, None
        assert chosen is not None
        spec = self._spec
        kv = chosen.kv if num_blocks is None else msgspec.structs.replace(chosen.kv, num_blocks=num_blocks)
        stored = chosen.checkpoint.stored()
        context = build_context(spec, chosen.kernels, spec.device, self._parallel, stored)
        with spec.architecture.blamed():
            model = chosen.model_class(spec.model_config, context)
        weights = self._with_progress(chosen.checkpoint)
        model.load_weights(weights if chosen.model_class.takes_blocks else decode_all(weights))
        loaded = self._clock.now()
        if self._stream is None and self.place.world == 1:
            self._stream = stream_for(spec.device)
        if self._stream is None:
            layers = self._allocate(kv, chosen.attention)
            self._runner, how_run = self._make_runner(model, layers, kv, chosen)
            selections = (*chosen.selections, how_run)
        else:
            torch.set_num_threads(chosen.threads)
            kv, selections = self._start_on_device(self._stream, model, kv, chosen)
        warn_if_short(spec, kv)
        graphs = self._runner.graph_seconds if isinstance(self._runner, DeviceRunner) else 0.0
        return ExecutorInfo(
            kv=kv,
            max_in_flight=max(self.place.num_stages, getattr(self._runner, "max_in_flight", 1)),
            feeds_tokens=self.place.world == 1,
            num_stages=self.place.num_stages,
            selections=selections,
            timings={
                "import": chosen.imported - chosen.began,
                "weights": loaded - chosen.imported,
                "cache": self._clock.now() - loaded - graphs,
                **({"graphs": graphs} if graphs else {}),
            },
        )

    def execute(self, plan: StepPlan, sampled: Sequence[SampledTokens] = ()) -> StepResult:
        """Run one step; see `ModelRunner.execute`. `sampled`: what was sampled since the previous plan was handed out;
        taken in before the plan, and passed over by the rank that sampled it. Only a rank with `place.samples` returns
        a result that says anything."""
        if self._runner is None:
            raise RuntimeError("the worker was not started, or was shut down")
        return self._runner.execute(plan, sampled)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Run one step after all earlier ones; the future carries what goes wrong. On a GPU it returns before the step
        is done, and up to `max_in_flight` steps may be open."""
        if isinstance(self._runner, DeviceRunner):
            return self._runner.submit(plan)
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.execute(plan))
        except Exception as error:
            future.set_exception(error)
        return future

    def check_health(self) -> None:
        """Raise if no further step can run."""
        if isinstance(self._runner, DeviceRunner):
            self._runner.check_health()

    def profile(self, plan: StepPlan) -> dict[str, float]:
        """Run one step in parts; see `ModelRunner.profile`."""
        if self._runner is None:
            raise RuntimeError("the worker was not started, or was shut down")
        return self._runner.profile(plan)

    def shutdown(self) -> None:
        """Drop model and cache; steps that are still open end first."""
        runner, self._runner = self._runner, None
        if isinstance(runner, DeviceRunner):
            runner.close()

    def _start_on_device(
        self, stream: Stream, model: Model, kv: KVCacheConfig, chosen: _Choices
    ) -> tuple[KVCacheConfig, tuple[Selection, ...]]:
        """Measure what steps take, give the cache what is left, and make the runner; returns the cache and all
        selections."""
        spec, attention, now = self._spec, chosen.attention, self._clock.now
        profile = profile_memory(spec, stream, model, chosen.kernels, attention, self._allocate)
        free = free_memory(spec.device) // self.place.sharers
        kv, how_large = measured_cache(spec, attention, kv, free, profile)
        layers = self._allocate(kv, attention)
        sampler = Sampler(
            spec.model_config.vocab_size, self._load_processors(), now, chosen.kernels.argmax, chosen.kernels.draw
        )
        runner = start_device_runner(spec, stream, model, layers, attention, chosen.kernels, kv, sampler, now)
        self._runner, how_run = runner
        return kv, (*chosen.selections, how_large, how_run)

    def _make_runner(
        self, model: Model, layers: dict[int, LayerCache], kv: KVCacheConfig, chosen: _Choices
    ) -> tuple[ModelRunner, Selection]:
        """What runs the steps, and how and why so."""
        spec, now, limits, kernels = self._spec, self._clock.now, self._spec.limits, chosen.kernels
        vocab_size, backends = spec.model_config.vocab_size, chosen.attention.backends
        batch = PersistentBatch(limits.max_num_seqs, spec.max_model_len, kv, torch.device(spec.device))
        sampler: Sampler | None = None
        if self.place.samples:
            sampler = Sampler(vocab_size, self._load_processors(), now, kernels.argmax, kernels.draw)
        program: StepProgram | str = "a step program cannot exchange anything with other ranks"
        if self.place.world == 1:
            tokens, rows = limits.max_num_batched_tokens, limits.max_num_seqs
            program = kernels.compile_step(model, list(layers.values()), tokens, rows)
        if isinstance(program, str):
            torch.set_num_threads(chosen.threads)
            runner = ModelRunner(model, layers, backends, batch, sampler, now, parallel=self._parallel)
            return runner, Selection("step", "op by op", program)
        # Nothing heavy is left to torch: it stays at one thread.
        runner = ModelRunner(model, layers, backends, batch, sampler, now, program)
        return runner, Selection("step", "program", program.describe())

    def _allocate(self, kv: KVCacheConfig, attention: AttentionPlan) -> dict[int, LayerCache]:
        """Attention layer of this stage → where it keeps its data. One cache tensor per place in a group; layers of
        different groups share tensors, never blocks."""
        caches: list[torch.Tensor] = []
        layers: dict[int, LayerCache] = {}
        groups = zip(attention.backends, attention.layers_here, strict=True)
        for number, (backend, here) in enumerate(groups):
            for index, layer in enumerate(here):
                if index == len(caches):
                    layout = backend.cache_layout(kv.num_blocks)
                    dtype = getattr(torch, layout.dtype)
                    caches.append(torch.empty(layout.shape, dtype=dtype, device=self._spec.device))
                layers[layer] = LayerCache(backend, caches[index], number)
        return dict(sorted(layers.items()))

    def _with_progress(self, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor | BlockWeight]]:
        total = checkpoint.num_weights()
        for done, pair in enumerate(checkpoint.weights(), start=1):
            yield pair
            self._on_event(ExecutorEvent("progress", "loading weights", {"done": done, "total": total}))

    def _load_processors(self) -> dict[str, Any]:
        vocab_size = self._spec.model_config.vocab_size
        return {component.name: component.build(vocab_size) for component in self._spec.logits_processors}
