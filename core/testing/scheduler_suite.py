"""`SchedulerConformance`: what every scheduling policy must do. No model, no torch, milliseconds a test.

    class TestMine(SchedulerConformance):
        scheduler = "mine"                  # the name it is installed under; or the class itself
        options = {"aging_s": 5.0}          # as in the configuration

The policy runs behind `interlace.testing.guard.CheckedPolicy`, so each test also checks what is always promised: that
it raises nothing, writes to no request, keeps no builder, leaves no step empty without need. The first words of a
failure name the promise. `pytest -k "history and 17"` repeats the random history of seed 17.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from interlace.clock import MonotonicClock
from interlace.config import load_settings
from interlace.interfaces.scheduler import Progress, RequestView, Scheduler, StepBuilder
from interlace.messages import StepPlan
from interlace.plugin_manager import PluginManager
from interlace.resolve import select_components
from interlace.scheduling.fallback import complete
from interlace.spec import Component, SchedulerLimits
from interlace.testing.conformance import Conformance
from interlace.testing.guard import CheckedPolicy, PolicyFault
from interlace.testing.harness import STEP_SECONDS, EngineHarness
from interlace.testing.histories import History
from interlace.testing.starvation import ENGINES, NEWCOMERS, SECONDS_PER_STEP, VICTIMS, steps_to_serve
from interlace.testing.time_limit import OutOfTimeError, time_limit

MAX_POINTS = 3000
"""Points of a fixed history after which it counts as endless; none that goes well comes near."""

_LONG = list(range(50, 70))
REQUESTS: Sequence[Mapping[str, Any]] = (
    {"prompt": list(range(9)), "max_tokens": 6, "priority": 1, "at": 0},
    {"prompt": list(range(20, 33)), "max_tokens": 5, "group": "g", "sample_index": 0, "at": 0},
    {"prompt": list(range(20, 33)), "max_tokens": 5, "group": "g", "sample_index": 1, "at": 0},
    {"prompt": [1, 2, 3], "max_tokens": 12, "at": 0},
    {"prompt": _LONG, "max_tokens": 3, "priority": -1, "at": 3},
    {"prompt": [*_LONG, 1, 2], "max_tokens": 4, "labels": {"tenant": "a"}, "at": 5},
    {"prompt": [7], "max_tokens": 1, "at": 8},
)
"""The fixed history: what arrives at which point. Its engine is too small for all of it at once."""
ENGINE: Mapping[str, Any] = {
    "limits": SchedulerLimits(max_num_batched_tokens=16, max_num_seqs=4),
    "num_blocks": 14,
    "block_size": 4,
    "max_in_flight": 2,
}

Disturb = Callable[[EngineHarness, int], None]


class SchedulerConformance(Conformance):
    """Subclass it and name the scheduler; see the module."""

    kind = "schedulers"
    selector = "scheduler"
    scheduler: ClassVar[str | type[Scheduler]]
    settings: ClassVar[Mapping[str, Any]] = {}
    """Further settings, for a scheduler that uses other plugins: `{"orderings.options.mine.key": 1}`."""
    seeds = range(30)
    starvation_steps: ClassVar[int] = 400
    """Steps, of one second of virtual time each, after which a request counts as starved. A policy that declares
    `starvation_free` and gives newcomers much more credit than seconds of waiting may need a larger bound."""
    time_limit_s: ClassVar[float] = 60.0
    """What no test may exceed; of use against endless loops only."""
    component: ClassVar[Component | None] = None
    """The scheduler as the configuration selects it, where it is named."""

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        replayed = list(cls.seeds)[::4]
        return {"seed": cls.seeds, "replayed": replayed, "newcomers": list(NEWCOMERS), "victim": list(VICTIMS)}

    @classmethod
    def setup_class(cls) -> None:
        super().setup_class()
        if isinstance(cls.scheduler, str):
            given = {"scheduler.use": cls.scheduler, f"scheduler.options.{cls.scheduler}": dict(cls.options)}
            loaded = load_settings({**given, **cls.settings}, env={})
            cls.component = select_components(loaded, PluginManager(loaded.settings))["schedulers"][0]

    @classmethod
    def make_policy(cls) -> Scheduler:
        """A fresh policy with the options of the suite."""
        policy: Scheduler = cls.target(cls.target_options) if cls.component is None else cls.component.build()
        return policy

    @contextmanager
    def checked_policy(self, what: str) -> Iterator[CheckedPolicy]:
        """A fresh policy under guard, for one engine. Faults become failures of the test, which say `what` was run."""
        try:
            policy = CheckedPolicy(self.make_policy())
            with time_limit(self.time_limit_s, "terminates: the test"):
                yield policy
                policy.check_end()
        except (PolicyFault, OutOfTimeError, AssertionError) as fault:
            raise AssertionError(f"{fault} ({what})") from fault

    # ── the class ─────────────────────────────────────────────────────────────────────────────────────────────

    def test_declaration(self) -> None:
        """The class is what the registry and the core take it for."""
        assert not inspect.isgeneratorfunction(self.target.plan), "plan must not contain yield: nobody would run it"
        assert not inspect.iscoroutinefunction(self.target.plan), "plan must not be async: the core does not await it"
        policy = self.make_policy()
        assert isinstance(policy.starvation_free, bool), f"starvation_free is {policy.starvation_free!r}, not a bool"
        assert getattr(policy, "options", None) == self.target_options, (
            "self.options is not what the policy was given: call super().__init__(options)"
        )

    def test_options(self) -> None:
        """Unknown options are refused, defaults are valid, and options survive the way to another process."""
        model = self.target.Options
        assert issubclass(model, BaseModel), f"Options is {model!r}, not a pydantic model"
        try:
            model(**self.options, no_such_option=1)
        except ValidationError:
            refused = True
        else:
            refused = False
        assert refused, 'options: an unknown one is accepted; state `model_config = ConfigDict(extra="forbid")`'
        required = {name for name, field in model.model_fields.items() if field.is_required()}
        missing = required - set(self.options)
        assert not missing, f"options: {sorted(missing)} have no default, and {type(self).__name__}.options lacks them"
        given = model(**{name: self.options[name] for name in required})
        for options in (given, self.target_options):
            plain = options.model_dump(mode="json")
            assert model(**plain) == options, f"options: {plain} are not valid themselves"

    # ── random traffic ────────────────────────────────────────────────────────────────────────────────────────

    def test_history(self, seed: int) -> None:
        """Anything at once: aborts, failing steps and rows, siblings, deadlines, blocked requests, few blocks."""
        self.run_history(seed)

    def test_equal_input_gives_equal_plans(self, replayed: int) -> None:
        """Nothing but the input decides: no randomness, no real time, nothing left over from another engine."""
        first, second = self.run_history(replayed, 40), self.run_history(replayed, 40)
        for one, other in zip(first, second, strict=False):
            assert one == other, f"determinism: history {replayed}, run twice, gives first\n{one}\nthen\n{other}"
        assert len(first) == len(second), f"determinism: history {replayed} takes {len(first)} or {len(second)} steps"

    def run_history(self, seed: int, min_steps: int = 50) -> list[StepPlan]:
        """Run the random history of `seed` (see `interlace.testing.histories`); returns its plans."""
        with self.checked_policy(f"history {seed}") as policy:
            history = History(seed, lambda source: policy)
            report = history.run(min_steps)
            assert "replaced" not in (report.degraded or ""), report.degraded
        return history.harness.plans

    # ── a fixed history, and everything that can happen to it ─────────────────────────────────────────────────

    def play(self, what: str, disturb: Disturb = lambda harness, point: None, **engine: Any) -> int:
        """Run the fixed history and check how each request ended. `disturb` is called before each call of the engine
        core, with the number of that point; returns how many there were."""
        with self.checked_policy(what) as policy:
            harness = EngineHarness(policy, **{**ENGINE, **engine})
            point = 0
            while harness.core.has_work or point <= REQUESTS[-1]["at"]:
                assert point < MAX_POINTS, f"terminates: {len(harness.core.queues.requests)} requests never end"
                disturb(harness, point)
                for index, fields in enumerate(REQUESTS):
                    if fields["at"] == point:
                        given = {name: value for name, value in fields.items() if name != "at"}
                        harness.add(id=f"r{index}", **given)
                self._go_on(harness, point)
                point += 1
            harness.check_end()
            degraded = harness.core.degraded
            assert degraded is None, f"progress: {degraded}"
        return point

    def _go_on(self, harness: EngineHarness, point: int) -> None:
        """Plan while there is room for a step under way, else complete one; let time pass when neither is possible."""
        if len(harness.in_flight) < harness.info.max_in_flight and harness.plan() is not None:
            return
        if harness.in_flight:
            harness.complete()
            return
        wakeup = harness.core.next_wakeup()
        harness.clock.advance(max(STEP_SECONDS, (wakeup or 0.0) - harness.clock.now()))

    def test_abort_at_any_point(self) -> None:
        """Each request is aborted before and during each step; all others get their tokens."""
        num_points = self.play("undisturbed")
        for index in range(len(REQUESTS)):
            for at in range(num_points):

                def abort(harness: EngineHarness, point: int, index: int = index, at: int = at) -> None:
                    if point == at:
                        harness.abort(f"r{index}")

                self.play(f"request {index} is aborted at point {at}", abort)

    def test_deadline_at_any_point(self) -> None:
        """The engine ends requests whose deadline has passed, waiting or running; all others get their tokens."""
        for step in range(1, 25):

            def hurry(harness: EngineHarness, point: int, step: int = step) -> None:
                if not point:
                    for size in (5, 2):
                        harness.add([5] * size, id=f"hurried{size}", max_tokens=9, deadline=step * STEP_SECONDS)

            self.play(f"two more requests have a deadline after {step} steps", hurry)

    def test_failing_steps(self) -> None:
        """A step fails, before or after it took effect, and with it those under way: the others go on."""
        for step in range(self.play("undisturbed") // 2):
            for ran in (True, False):
                self.play(f"step {step} fails, {ran=}", fail_steps=(step,), failed_steps_run=ran)

    def test_steps_in_flight(self) -> None:
        """Up to three steps are planned before the first result is known."""
        for depth in (1, 2, 3):
            for feeds in (True, False):
                self.play(f"max_in_flight={depth}, feeds_tokens={feeds}", max_in_flight=depth, feeds_tokens=feeds)
            self.play(f"{depth} pipeline stages", max_in_flight=depth, num_stages=depth, feeds_tokens=False)

    def test_preemption_pressure(self) -> None:
        """Requests outgrow the blocks: somebody has to give way, and everybody gets done in the end."""
        for num_blocks in range(9, 26):
            for reserve in (True, False):
                limits = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, reserve_full_prompt=reserve)
                what = f"{num_blocks} blocks, reserve_full_prompt={reserve}"
                self.play(what, num_blocks=num_blocks, limits=limits)
                self.play(f"{what}, windows", num_blocks=2 * num_blocks, limits=limits, windows=(0, 6))

    def test_budgets(self) -> None:
        """The policy copes with any budget, the smallest included."""
        for tokens in (1, 2, 7, 4096):
            for seats in (1, 2, 64):
                for threshold in (0, 1, 5):
                    limits = SchedulerLimits(
                        max_num_batched_tokens=tokens, max_num_seqs=seats, long_prefill_token_threshold=threshold
                    )
                    self.play(f"{tokens} tokens, {seats} seats, chunks of {threshold or 'any'} tokens", limits=limits)

    # ── over a long time ──────────────────────────────────────────────────────────────────────────────────────

    def test_forgets_finished_requests(self) -> None:
        """An engine runs for months; a policy that refers to every request it ever saw fills the memory."""
        with self.checked_policy("200 requests in waves") as policy:
            harness = EngineHarness(policy, num_blocks=64)
            for wave in range(20):
                for index in range(10):
                    harness.add([wave, index, 3], max_tokens=2 + index % 3)
                harness.run()

    def test_no_starvation(self, newcomers: str, victim: str) -> None:
        """For policies that declare it: an endless stream of newcomers holds nobody up for ever."""
        if not self.make_policy().starvation_free:
            pytest.skip(f"{self.target.__name__} does not declare starvation_free with these options")
        for engine in ENGINES:
            what = f"a '{victim}' request among endless '{newcomers}' ones, {engine}"
            with self.checked_policy(what) as policy:
                steps = steps_to_serve(policy, newcomers, victim, engine, self.starvation_steps)
                assert steps is not None, (
                    f"starvation_free: a request is not done {self.starvation_steps} steps of "
                    f"{SECONDS_PER_STEP:g} s after its arrival"
                )

    # ── cost ──────────────────────────────────────────────────────────────────────────────────────────────────

    def test_cost(self) -> None:
        """Prints microseconds per step (`pytest -s`), beside those of arrival order: a step of a small model on a GPU
        takes some 5,000, and the policy's time adds to each."""
        for num_requests in (64, 256):
            own, least = (
                _seconds_per_step(policy, num_requests) * 1e6 for policy in (self.make_policy(), _ArrivalOrder())
            )
            print(
                f"{self.target.__name__}: {own:.0f} us per step with {num_requests} requests running and as many "
                f"waiting (arrival order: {least:.0f} us)"
            )


class _ArrivalOrder(Scheduler):
    """The core's own fallback, as a measure."""

    def __init__(self) -> None:
        super().__init__(self.Options())

    def plan(self, step: StepBuilder) -> None:
        complete(step)  # type: ignore[arg-type]


class _Timed(Scheduler):
    """Measures the time spent in a policy and the primitives it calls."""

    def __init__(self, policy: Scheduler) -> None:
        super().__init__(policy.options)
        self.seconds = 0.0
        self._policy = policy
        self._clock = MonotonicClock()

    def _run(self, method: str, *arguments: Any) -> Any:
        began = self._clock.now()
        try:
            return getattr(self._policy, method)(*arguments)
        finally:
            self.seconds += self._clock.now() - began

    def plan(self, step: StepBuilder) -> None:
        self._run("plan", step)

    def order_key(self, request: RequestView) -> Any:
        return self._run("order_key", request)

    def on_update(self, progress: Progress, now: float) -> None:
        self._run("on_update", progress, now)


def _seconds_per_step(policy: Scheduler, num_requests: int, num_steps: int = 40) -> float:
    """Mean over decode steps of `num_requests` requests, while as many wait."""
    timed = _Timed(policy)
    limits = SchedulerLimits(max_num_batched_tokens=8192, max_num_seqs=num_requests)
    harness = EngineHarness(timed, limits=limits, num_blocks=num_requests * 8, block_size=16)
    for index in range(2 * num_requests):
        harness.add([index % 200, 1 + index % 7, 3], max_tokens=100)
    for step in range(5 + num_steps):
        if step == 5:
            timed.seconds = 0.0
        assert harness.step() is not None, f"progress: nothing is planned in step {step} of {num_requests} requests"
    return timed.seconds / num_steps
