"""`ScriptedExecutor`: an executor without a model, for tests of whatever decides what runs when.

A step takes microseconds, its tokens are known beforehand, and every plan is checked (see `CheckedWorker`):

    executor = ScriptedExecutor(ScriptedExecutor.Options(num_blocks=32, max_in_flight=2))

It is used directly by `EngineHarness`, and by name wherever an engine is built from a spec (`scripted_spec`), in a
child process too. Subclasses override `next_token`, `step_error` or `row_error` to write another script.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.kv.specs import KVCacheConfig, KVGroup
from interlace.messages import Admission, StepPlan, StepResult
from interlace.model_config import ModelConfig
from interlace.spec import CacheSpec, Component, ResolvedSpec, SchedulerLimits
from interlace.testing.checked_worker import CheckedWorker, ContentRoot, PlanError


class _Submitted(NamedTuple):
    plan: StepPlan
    future: Future[StepResult]


class ScriptedExecutor(Executor):
    """Runs plans on one `CheckedWorker`, at once, after a delay, or one by one when told to."""

    class Options(BaseModel):
        """Options of the scripted executor."""

        model_config = ConfigDict(extra="forbid")

        block_size: int = Field(default=4, ge=1, description="Tokens per KV block.")
        num_blocks: int = Field(default=64, ge=2, description="KV blocks, the null block included.")
        windows: tuple[int, ...] = Field(
            default=(0,), description="One KV group per entry: its window, 0 for full attention."
        )
        max_in_flight: int = Field(default=1, ge=1, description="Steps that may be under way.")
        feeds_tokens: bool = Field(default=True, description="Whether a sample reaches the next step without the core.")
        num_stages: int = Field(default=1, ge=1, description="Pipeline stages.")
        vocab_size: int = Field(default=256, ge=2, description="Tokens are 0 to vocab_size - 1, each equally likely.")
        manual: bool = Field(default=False, description="Run a step only when `run_next` is called.")
        delay_s: float = Field(default=0.0, ge=0, description="Seconds a step takes, spent on a thread of its own.")
        fail_steps: tuple[int, ...] = Field(default=(), description="Ids of steps that fail as a whole.")
        failed_steps_run: bool = Field(
            default=True, description="Whether a failing step has taken effect before it fails."
        )
        healthy_after_failure: bool = Field(
            default=True, description="Whether the executor can go on after a failed step."
        )
        start_error: str = Field(default="", description="Fail to start, with this text.")

    def __init__(self, options: BaseModel, *, content_root: ContentRoot | None = None) -> None:
        super().__init__(options)
        self.content_root = content_root
        self.worker: CheckedWorker | None = None
        self.num_run = 0
        self._queue: deque[_Submitted] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._unhealthy: Exception | None = None

    # ── the script ────────────────────────────────────────────────────────────────────────────────────────────

    def next_token(self, tokens: Sequence[int], admission: Admission) -> int:
        """A hash of everything before it: one wrong token changes all that follow. Siblings of n > 1 differ."""
        return hash((*tokens, admission.seed, admission.sample_index)) % int(self.options.vocab_size)

    def step_error(self, plan: StepPlan) -> Exception | None:
        """Why this step fails as a whole, or None."""
        if plan.step_id in self.options.fail_steps:
            return RuntimeError(f"scripted failure of step {plan.step_id}")
        return None

    def row_error(self, plan: StepPlan, row: int) -> str | None:
        """Why only this row's request fails, or None."""
        return None

    # ── the contract ──────────────────────────────────────────────────────────────────────────────────────────

    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        options = self.options
        if options.start_error:
            raise RuntimeError(options.start_error) from ValueError("a scripted cause")
        on_event(ExecutorEvent("progress", "nothing to load", {"done": 1, "total": 1}))
        groups = tuple(KVGroup("window" if w else "full", w, (i,)) for i, w in enumerate(options.windows))
        kv = KVCacheConfig(
            block_size=options.block_size, num_blocks=options.num_blocks, groups=groups, bytes_per_block=1
        )
        self.worker = CheckedWorker(
            kv,
            max_num_seqs=spec.limits.max_num_seqs,
            max_model_len=spec.max_model_len,
            next_token=self.next_token,
            content_root=self.content_root,
        )
        if options.delay_s:
            self._thread = threading.Thread(target=self._run_delayed, name="scripted-executor", daemon=True)
            self._thread.start()
        return ExecutorInfo(
            kv=kv,
            max_in_flight=options.max_in_flight,
            feeds_tokens=options.feeds_tokens,
            num_stages=options.num_stages,
        )

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queue a step. Raises `PlanError` for too many steps under way, or a row that lacks its newest token."""
        step = _Submitted(plan, Future())
        with self._changed:
            self._check_order(plan)
            self._queue.append(step)
            self._changed.notify_all()
        if not self.options.manual and not self.options.delay_s:
            self.run_next()
        return step.future

    def control(self, operation: str, **arguments: Any) -> Any:
        """`num_run`: steps run so far. `echo`: its arguments. Anything else is refused."""
        match operation:
            case "num_run":
                return self.num_run
            case "echo":
                return arguments
            case _:
                return super().control(operation, **arguments)

    def check_health(self) -> None:
        if self._unhealthy is not None:
            raise RuntimeError("the scripted executor is broken") from self._unhealthy

    def shutdown(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ── running ───────────────────────────────────────────────────────────────────────────────────────────────

    def run_next(self) -> None:
        """Run the oldest step under way and settle its future; if it fails, all others under way fail, too."""
        with self._changed:
            step = self._queue[0]
        try:
            result = self._run(step.plan)
        except Exception as error:
            with self._changed:
                failed, self._queue = list(self._queue), deque()
            if not self.options.healthy_after_failure:
                self._unhealthy = error
            step.future.set_exception(error)
            for later in failed[1:]:
                self._worker.skip(later.plan)
                later.future.set_exception(RuntimeError(f"step {step.plan.step_id}, before this one, failed"))
            return
        with self._changed:
            self._queue.popleft()
        step.future.set_result(result)

    @property
    def _worker(self) -> CheckedWorker:
        assert self.worker is not None, "the scripted executor was not started"
        return self.worker

    def _run(self, plan: StepPlan) -> StepResult:
        error = self.step_error(plan)
        if error is not None and not self.options.failed_steps_run:
            self._worker.skip(plan)
            raise error
        self._worker.apply(plan)
        errors = {row: text for row in range(len(plan.slots)) if (text := self.row_error(plan, row)) is not None}
        result = self._worker.compute(plan, errors, self.options.delay_s or 0.001)
        if error is not None:
            raise error
        self.num_run += 1
        return result

    def _run_delayed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped or self._changed.wait_for(lambda: self._stopped, self.options.delay_s):
                    return
            self.run_next()

    def _check_order(self, plan: StepPlan) -> None:
        """What depends on the steps still under way."""
        if len(self._queue) >= self.options.max_in_flight:
            raise PlanError(f"step {plan.step_id} is one more than {self.options.max_in_flight} under way")
        if self._queue and plan.step_id <= self._queue[-1].plan.step_id:
            raise PlanError(f"step {plan.step_id} comes after step {self._queue[-1].plan.step_id}")
        if self.options.feeds_tokens:
            return
        sampling: set[int] = set()
        for earlier in (*(step.plan for step in self._queue), plan):
            sampling -= {admission.slot for admission in earlier.admitted}
            if earlier is plan and (hasty := sampling & set(plan.slots)):
                raise PlanError(f"step {plan.step_id}: slots {sorted(hasty)} still have a sample under way")
            sampling |= {slot for slot, samples in zip(earlier.slots, earlier.sample, strict=True) if samples}


def scripted_spec(
    scheduler: str,
    *,
    executor: str = "interlace.testing.executor:ScriptedExecutor",
    limits: SchedulerLimits | None = None,
    prefix_caching: bool = True,
    max_model_len: int = 256,
    scheduler_options: dict[str, Any] | None = None,
    **options: Any,
) -> ResolvedSpec:
    """An engine of the scheduler class `scheduler` ("module:Class") over a scripted executor with `options`."""

    def component(kind: str, target: str, **given: Any) -> Component:
        return Component(kind=kind, name=target.rpartition(":")[2].lower(), target=target, options=given)

    config = ModelConfig(
        architecture="Scripted",
        vocab_size=options.get("vocab_size", 256),
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=1,
        norm_eps=1e-6,
        max_position_embeddings=max_model_len,
    )
    return ResolvedSpec(
        model="scripted",
        model_path="",
        model_config=config,
        checkpoint=component("checkpoints", "none:None"),
        architecture=component("models", "none:None"),
        scheduler=component("schedulers", scheduler, **(scheduler_options or {})),
        executor=component("executors", executor, **options),
        attention=(),
        kernels=(),
        limits=limits or SchedulerLimits(),
        cache=CacheSpec(block_size=options.get("block_size", 4), prefix_caching=prefix_caching),
        max_model_len=max_model_len,
    )
