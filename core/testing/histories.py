"""Random histories: traffic, and everything that can happen to it, from one seed.

    report = run_history(1234, lambda random: MyScheduler(MyScheduler.Options()))

A history draws an engine (budgets, block size, KV groups, steps in flight, …) and then, until at least `min_steps`
steps were planned, adds requests (shared prefixes, siblings, salts, deadlines, blocked ones), aborts some at any
point, lets steps and single rows fail, and empties the prefix cache; then it lets the engine finish. `EngineHarness`
checks everything on the way and every outcome at the end. The same seed and policy give the same history.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from interlace.interfaces.scheduler import Scheduler
from interlace.messages import StepPlan
from interlace.spec import SchedulerLimits
from interlace.testing.executor import ScriptedExecutor
from interlace.testing.harness import STEP_SECONDS, EngineHarness

MakePolicy = Callable[[random.Random], Scheduler]
MAX_STEPS_WITHOUT_END = 4000
"""Steps without any request ending after which a history counts as stuck."""


@dataclass(frozen=True)
class HistoryReport:
    """What came of a history, to see that the traffic was worth it."""

    num_steps: int
    num_requests: int
    num_preemptions: int
    num_hit_tokens: int
    num_aborted: int
    num_failed: int
    degraded: str | None


class FaultyExecutor(ScriptedExecutor):
    """Steps and rows fail at random."""

    def __init__(self, options: Any, source: random.Random, step_faults: float, row_faults: float) -> None:
        super().__init__(options)
        self._random = source
        self._step_faults = step_faults
        self._row_faults = row_faults
        self.enabled = True

    def step_error(self, plan: StepPlan) -> Exception | None:
        faulty = self.enabled and self._random.random() < self._step_faults
        return RuntimeError(f"scripted failure of step {plan.step_id}") if faulty else None

    def row_error(self, plan: StepPlan, row: int) -> str | None:
        faulty = self.enabled and self._random.random() < self._row_faults
        return f"scripted failure of row {row}" if faulty else None


class History:
    """One random history under way."""

    def __init__(self, seed: int, make_policy: MakePolicy) -> None:
        self.random = source = random.Random(seed)
        size = source.choice((1, 2, 3, 4, 8))
        self.windows = source.choice(((0,), (0,), (0, 6), (0, 5, 5), (7,), (3, 0)))
        self.max_model_len = source.choice((24, 40, 64))
        enough = len(self.windows) * -(-self.max_model_len // size)
        limits = SchedulerLimits(
            max_num_batched_tokens=source.choice((1, 3, 8, 16, 64, 256)),
            max_num_seqs=source.choice((1, 2, 3, 4, 8)),
            long_prefill_token_threshold=source.choice((0, 0, 2, 5)),
            watermark=source.choice((0.0, 0.01, 0.2)),
            reserve_full_prompt=source.random() < 0.7,
            starvation_timeout_s=source.choice((0.05, 60.0)),
        )
        executor = FaultyExecutor(
            ScriptedExecutor.Options(
                manual=True,
                block_size=size,
                num_blocks=2 + int(enough * source.choice((0.4, 0.8, 1.0, 1.5, 4.0))),
                windows=self.windows,
                max_in_flight=(depth := source.randint(1, 3)),
                num_stages=depth if seed % 2 else 1,
                feeds_tokens=source.random() < 0.5,
                vocab_size=32,
                failed_steps_run=source.random() < 0.5,
            ),
            source,
            step_faults=source.choice((0.0, 0.0, 0.03)),
            row_faults=source.choice((0.0, 0.0, 0.02)),
        )
        self.executor = executor
        self.harness = EngineHarness(
            make_policy(source),
            limits=limits,
            executor=executor,
            prefix_caching=source.random() < 0.7,
            max_model_len=self.max_model_len,
        )
        self.prefixes = [[source.randrange(32) for _ in range(source.choice((8, 16, 30)))] for _ in range(3)]
        self.rate = source.choice((0.1, 0.3, 0.8))
        self.abort_rate = source.choice((0.0, 0.02, 0.1))
        self.num_added = 0

    # ── traffic ───────────────────────────────────────────────────────────────────────────────────────────────

    def arrive(self) -> None:
        """One user request: one or more requests of the engine."""
        source = self.random
        prompt = source.choice(self.prefixes)[: source.randint(1, 30)] if source.random() < 0.7 else []
        prompt += [source.randrange(32) for _ in range(source.randrange(1, 12))]
        prompt = prompt[: source.choice((self.max_model_len - 6, self.max_model_len - 6, self.max_model_len))]
        copies = source.choice((1, 1, 1, 2, 4))
        self.num_added += 1
        fields: dict[str, Any] = {
            "priority": source.randrange(3),
            "cache_salt": source.choice((None, None, None, "a", "b")),
            "adapter": source.choice((None, None, None, "x")),
            "eos_token_ids": source.choice(((), (0,), (0, 1, 2))),
            "stop_token_ids": source.choice(((), (3,))),
            "ignore_eos": source.random() < 0.1,
            "max_tokens": source.choice((None, 1, 2, 6, 12, 30)),
            "skip_reading_prefix_cache": source.random() < 0.1,
            "group": f"g{self.num_added}" if copies > 1 else None,
            "blocked_on": source.choice(((), (), (), (), ("grammar",), ("grammar", "sibling"))),
        }
        if fields["max_tokens"] not in (1, 2):
            fields["min_tokens"] = source.choice((0, 0, 3))
        if source.random() < 0.05:
            fields["deadline"] = self.harness.clock.now() + source.random()
        for index in range(copies):
            name = f"r{self.num_added}.{index}"
            self.harness.add(prompt, id=name, sample_index=index, seed=self.num_added, **fields)

    def disturb(self) -> None:
        """Anything that may happen between two calls of the engine core."""
        source, core = self.random, self.harness.core
        unfinished = list(core.queues.requests)
        if unfinished and source.random() < self.abort_rate:
            self.harness.abort(*source.sample(unfinished, source.randint(1, min(3, len(unfinished)))), "nobody")
        for request in list(core.queues.blocked.values()):
            if source.random() < 0.2:
                core.unblock(request.id, source.choice(sorted(request.blocked_on)))
        if source.random() < 0.01:
            core.reset_prefix_cache()
        if source.random() < 0.05:
            self.harness.clock.advance(source.random() / 10)

    def turn(self) -> bool:
        """Plan or complete one step, at random where both are possible. False: neither was."""
        harness = self.harness
        may_plan = len(harness.in_flight) < harness.info.max_in_flight
        if may_plan and (not harness.in_flight or self.random.random() < 0.7):
            if harness.plan() is not None:
                return True
            self.disturb()
        if harness.in_flight:
            harness.complete()
            return True
        return False

    # ── the whole ─────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, min_steps: int) -> HistoryReport:
        """Traffic for `min_steps` steps, then the rest. Raises `AssertionError` when anything is wrong."""
        harness = self.harness
        while len(harness.plans) < min_steps:
            while self.random.random() < self.rate and len(harness.core.queues.requests) < 40:
                self.arrive()
            self.disturb()
            if not self.turn():
                self._idle()
        self.executor.enabled = False
        self.abort_rate = 0.0
        self._finish()
        return self._report()

    def _finish(self) -> None:
        core, left, since = self.harness.core, -1, 0
        while core.has_work:
            self.disturb()
            if not self.turn():
                self._idle()
            since = since + 1 if len(core.queues.requests) == left else 0
            left = len(core.queues.requests)
            assert since < MAX_STEPS_WITHOUT_END, f"stuck: {list(core.queues.requests.values())}"
        self.harness.check_end()

    def _idle(self) -> None:
        """Nothing can run: time passes until something may."""
        clock = self.harness.clock
        wakeup = self.harness.core.next_wakeup()
        clock.advance(max(STEP_SECONDS, min(1.0, (wakeup or 0.0) - clock.now())))

    def _report(self) -> HistoryReport:
        records = self.harness.records.values()
        return HistoryReport(
            num_steps=len(self.harness.plans),
            num_requests=len(records),
            num_preemptions=sum(record.finish.num_preemptions for record in records if record.finish),
            num_hit_tokens=sum(record.cached_tokens or 0 for record in records),
            num_aborted=sum(record.reason == "abort" for record in records),
            num_failed=sum(record.reason == "error" for record in records),
            degraded=self.harness.core.degraded,
        )


def run_history(seed: int, make_policy: MakePolicy, min_steps: int = 50) -> HistoryReport:
    """Run the history of `seed` with a policy; raises `AssertionError` naming the seed when anything is wrong."""
    try:
        return History(seed, make_policy).run(min_steps)
    except AssertionError as error:
        raise AssertionError(f"history {seed}: {error}") from error
