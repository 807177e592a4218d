"""`ExecutorConformance`: what every executor must do, shown with a tiny model of random weights in seconds.

    class TestMine(ExecutorConformance):
        executor = "mine"                   # the name it is installed under; or the class itself
        options = {"workers": 2}            # as in the configuration
        settings = {"device": "cuda"}       # further settings, if it needs some

An executor is driven as the engine does it: up to `max_in_flight` steps under way, results taken in order. What it
computes is compared with one `Worker` that is given the same plans.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from pydantic import ValidationError

from interlace.config import load_settings
from interlace.interfaces.executor import Executor, ExecutorEvent, ExecutorInfo
from interlace.messages import BlockDelta, StepPlan, StepResult, TokenLogprobs
from interlace.plugin_manager import PluginManager
from interlace.resolve import resolve
from interlace.spec import Component, ResolvedSpec
from interlace.testing.conformance import Conformance
from interlace.testing.executor_driver import Driver, UnhealthyError, WorkerExecutor
from interlace.testing.faults import MESSAGE, failing, unreadable
from interlace.testing.footprint import Footprint
from interlace.testing.time_limit import OutOfTimeError, time_limit

MODEL: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
SETTINGS: Mapping[str, Any] = {
    "checkpoint.use": "dummy",
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 96,
    "cache.block_size": 8,
    "cache.memory": "64MiB",
    "cache.max_blocks": 17,
    "scheduler.max_num_seqs": 6,
    "scheduler.max_num_batched_tokens": 24,
}
"""Small enough for chunked prefill, waiting requests and preemption to happen."""
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 8}


class ExecutorConformance(Conformance):
    """Subclass it and name the executor; see the module."""

    kind = "executors"
    selector = "executor"
    executor: ClassVar[str | type[Executor]]
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings on top of `SETTINGS`, as dotted keys."""
    seeds = range(3)
    timeout_s: ClassVar[float] = 60.0
    """What starting, stopping or one step may take."""
    patience_s: ClassVar[float] = 5.0
    """How long processes, threads and files may take to go after `shutdown` has returned."""

    # ── means ─────────────────────────────────────────────────────────────────────────────────────────────────

    def spec(self, folder: Path, **changes: Any) -> ResolvedSpec:
        """The spec of an engine with this executor and the tiny model, as the configuration resolves it."""
        (folder / "config.json").write_text(json.dumps(MODEL))
        given: dict[str, Any] = {"model": str(folder), **SETTINGS, **self.settings}
        if isinstance(self.executor, str):
            given["executor"] = {"use": self.executor, "options": {self.executor: dict(self.options)}}
        loaded = load_settings(given, env={})
        spec = resolve(loaded, PluginManager(loaded.settings))
        if not isinstance(self.executor, str):
            target = f"{self.executor.__module__}:{self.executor.__qualname__}"
            component = Component(kind="executors", name="tested", target=target, options=dict(self.options))
            spec = msgspec.structs.replace(spec, executor=component)
        return msgspec.structs.replace(spec, **changes)

    def make_executor(self) -> Executor:
        """A fresh executor with the options of the suite, not started."""
        executor: Executor = self.target(self.target_options)
        return executor

    @contextmanager
    def driver(self, spec: ResolvedSpec, executor: Executor | None = None) -> Iterator[Driver]:
        """A started executor, stopped afterwards. What exceeds its time fails the test."""
        executor = executor or self.make_executor()
        try:
            try:
                yield Driver(executor, spec, self.timeout_s)
            finally:
                with time_limit(self.timeout_s, "shutdown"):
                    executor.shutdown()
        except OutOfTimeError as error:
            raise AssertionError(f"no hanging: {error}") from error

    def reference_tokens(self, spec: ResolvedSpec, prompt: list[int], **params: Any) -> list[int]:
        """What one worker generates for a request alone."""
        with self.driver(spec, WorkerExecutor()) as driver:
            request = driver.add(prompt, **params)
            driver.run()
            return driver.tokens[request]

    # ── the class ─────────────────────────────────────────────────────────────────────────────────────────────

    def test_options(self) -> None:
        """Unknown options are refused, and the executor keeps what it was given."""
        try:
            self.target.Options(**self.options, no_such_option=1)
        except ValidationError:
            refused = True
        else:
            refused = False
        assert refused, 'options: an unknown one is accepted; state `model_config = ConfigDict(extra="forbid")`'
        assert getattr(self.make_executor(), "options", None) == self.target_options, (
            "self.options is not what the executor was given: call super().__init__(options)"
        )

    # ── running ───────────────────────────────────────────────────────────────────────────────────────────────

    def test_start_says_what_it_offers(self, tmp_path: Path) -> None:
        """KV cache, steps in flight, what was chosen and how long the parts of the start took; and it is healthy."""
        spec = self.spec(tmp_path)
        with self.driver(spec) as driver:
            info, kv = driver.info, driver.info.kv
            assert isinstance(info, ExecutorInfo), f"start returned {info!r}"
            again = msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=ExecutorInfo)
            assert again == info, f"info: {info} does not survive the way to another process"
            assert kv.block_size == spec.cache.block_size, f"info: blocks of {kv.block_size} tokens"
            assert 2 <= kv.num_blocks <= (spec.cache.max_blocks or 2), f"info: {kv.num_blocks} blocks"
            assert kv.bytes_per_block > 0, "info: blocks without bytes"
            layers = sorted(layer for group in kv.groups for layer in group.layers)
            assert layers == list(range(MODEL["num_hidden_layers"])), f"info: KV groups hold the layers {layers}"
            assert info.max_in_flight >= 1, f"info: max_in_flight is {info.max_in_flight}"
            kinds = {selection.kind for selection in info.selections}
            assert {"attention", "kernels"} <= kinds, f"info: selections tell of {sorted(kinds)} only"
            assert info.timings and all(seconds >= 0 for seconds in info.timings.values()), f"info: {info.timings}"
            for event in driver.events:
                assert isinstance(event, ExecutorEvent), f"on_event was given {event!r}"
            driver.check_health()

    def test_results_are_those_of_a_worker(self, tmp_path: Path, seed: int) -> None:
        """Greedy and seeded requests of all kinds, in chunks, preempted: the tokens of one worker, in order."""
        spec = self.spec(tmp_path)
        with self.driver(spec) as driver:
            add_traffic(driver, random.Random(seed))
            driver.run()
            self._check_order(driver)
            depth = driver.info.max_in_flight if driver.info.feeds_tokens else driver.info.num_stages
            assert driver.most_in_flight >= depth, f"info: of {depth} steps only {driver.most_in_flight} were under way"
        with self.driver(spec, WorkerExecutor()) as reference:
            one, found = reference.info.kv, driver.info.kv
            assert found.bytes_per_block >= one.bytes_per_block, "info: blocks are smaller than those of one worker"
            alike = msgspec.structs.replace(found, bytes_per_block=one.bytes_per_block)  # ranks may have copies
            assert alike == one, "info: one worker has another KV cache"
            for plan, result in driver.steps:
                _check_same(plan, result, reference.submit(plan).result())

    def _check_order(self, driver: Driver) -> None:
        submitted = [plan.step_id for plan, _ in driver.steps]
        assert driver.settled == submitted, (
            f"order: steps {submitted} were submitted, {driver.settled} is how they ended"
        )

    def test_empty_plans(self, tmp_path: Path) -> None:
        """A plan without rows is legal, from the first step on."""
        spec = self.spec(tmp_path)
        with self.driver(spec) as driver:
            for step in range(3):
                result = driver.result(driver.submit(_empty_plan(driver, step)))
                assert (result.step_id, result.counts, result.token_ids) == (step, [], []), (
                    f"an empty plan gave {result}"
                )

    def test_unknown_operation(self, tmp_path: Path) -> None:
        """`control` refuses what it does not know by name, and goes on."""
        with self.driver(self.spec(tmp_path)) as driver:
            with time_limit(self.timeout_s, "control"):
                try:
                    driver.executor.control("no_such_operation", value=1)
                except ValueError as error:
                    refusal = str(error)
                else:
                    refusal = ""
            assert "no_such_operation" in refusal, "control: an unknown operation should be a ValueError that names it"
            driver.check_health()

    # ── failing ───────────────────────────────────────────────────────────────────────────────────────────────

    def test_a_row_fails_alone(self, tmp_path: Path) -> None:
        """A request that cannot be sampled is reported in the result; the others get their tokens."""
        spec = self.spec(tmp_path, logits_processors=(failing(),))
        expected = self.reference_tokens(spec, [7, 8, 9], **GREEDY)
        with self.driver(spec) as driver:
            good = driver.add([7, 8, 9], **GREEDY)
            bad = driver.add([4, 5], logits_processors={failing().name: {}}, **GREEDY)
            driver.run()
            assert MESSAGE in (driver.errors.get(bad) or ""), (
                f"errors: a row that failed with '{MESSAGE}' is reported as {driver.errors.get(bad)!r}"
            )
            assert driver.tokens[bad] == [], f"errors: a failed row has tokens {driver.tokens[bad]}"
            assert driver.tokens[good] == expected, f"errors: another row has {driver.tokens[good]}, alone {expected}"

    def test_a_failing_step_is_reported(self, tmp_path: Path) -> None:
        """The future of a step that cannot run carries an exception, and its successors end somehow; then either new
        requests get their tokens, or `check_health` raises."""
        spec = self.spec(tmp_path)
        expected = self.reference_tokens(spec, [7, 8, 9], **GREEDY)
        for spoiled in (0, 3):
            with self.driver(spec) as driver:
                first = driver.add([1, 2, 3, 4], **GREEDY)
                driver.spoil = spoiled
                driver.run()
                assert driver.failures, f"failure: step {spoiled}, which names a slot that does not exist, succeeded"
                assert driver.errors.get(first), "failure: a request of a failed step has no error"
                try:
                    driver.check_health()
                except UnhealthyError:
                    continue
                later = driver.add([7, 8, 9], **GREEDY)
                driver.run()
                assert driver.tokens[later] == expected, (
                    f"failure: after a failed step check_health raises nothing, but a new request gets "
                    f"{driver.tokens[later]} (error: {driver.errors.get(later)}), alone {expected}"
                )

    def test_a_failed_start_says_why(self, tmp_path: Path) -> None:
        """`start` raises the true cause; shutdown works, nothing stays behind, and the next engine starts."""
        spec = self.spec(tmp_path)
        broken = msgspec.structs.replace(spec, checkpoint=unreadable())
        for attempt in range(2):  # what the first one loads once and for all is no leak
            before = Footprint.take()
            executor = self.make_executor()
            error = self._failed_start(executor, broken)
            during = Footprint.take()
            for _ in range(2):
                with self._limit("shutdown after a failed start"):
                    executor.shutdown()
            assert MESSAGE in _whole_text(error), (
                f"start: the cause '{MESSAGE}' is neither in what start raised nor in its chain: {error!r}"
            )
            del error, executor
            left = before.left_of(during, self.patience_s) if attempt else []
            assert not left, f"nothing left behind: after a failed start and shutdown there is {', '.join(left)}"
        with self.driver(spec) as driver:
            driver.check_health()

    def _failed_start(self, executor: Executor, spec: ResolvedSpec) -> Exception:
        with self._limit("a start that fails"):
            try:
                executor.start(spec, lambda event: None)
            except Exception as error:
                return error.with_traceback(None)
        raise AssertionError("start: it succeeded although the weights cannot be read")

    # ── stopping ──────────────────────────────────────────────────────────────────────────────────────────────

    def test_leaves_nothing_behind(self, tmp_path: Path) -> None:
        """After shutdown there is no process, thread, file descriptor or shared memory that was not there before."""
        spec = self.spec(tmp_path)
        self._use(spec)  # what the first one loads once and for all is no leak
        before = Footprint.take()
        during = self._use(spec)
        left = before.left_of(during, self.patience_s)
        assert not left, f"nothing left behind: after shutdown there is {', '.join(left)}"

    def _use(self, spec: ResolvedSpec) -> Footprint:
        with self.driver(spec) as driver:
            driver.add([1, 2, 3], **GREEDY)
            driver.run()
            return Footprint.take()

    def test_shutdown(self, tmp_path: Path) -> None:
        """Twice, and with steps under way; what is submitted afterwards fails, and nothing waits for ever."""
        spec = self.spec(tmp_path)
        with self.driver(spec) as driver:
            driver.add([1, 2, 3], **GREEDY)
            futures = driver.submit_all()
            for _ in range(2):
                with time_limit(self.timeout_s, "shutdown"):
                    driver.executor.shutdown()
            for future in futures:
                driver.wait(future)
            assert self._fails_after_shutdown(driver), "shutdown: a step that is submitted afterwards succeeds"

    def _fails_after_shutdown(self, driver: Driver) -> bool:
        plan = _empty_plan(driver, 1000)
        with self._limit("submit after shutdown"):
            try:
                future: Future[StepResult] = driver.executor.submit(plan)
            except Exception:
                return True
        driver.wait(future)
        return future.cancelled() or future.exception() is not None

    def test_one_after_another_and_two_at_once(self, tmp_path: Path) -> None:
        """Two engines live in one process; neither notices the other."""
        spec = self.spec(tmp_path)
        expected = self.reference_tokens(spec, [7, 8, 9], **GREEDY)
        with self.driver(spec) as first, self.driver(spec) as second:
            requests = [(driver, driver.add([7, 8, 9], **GREEDY)) for driver in (first, second)]
            while len([driver for driver in (first, second) if driver.step()]):
                pass
            for driver, request in requests:
                assert driver.tokens[request] == expected, f"two engines: {driver.tokens[request]}, alone {expected}"
        with self.driver(spec) as third:
            request = third.add([7, 8, 9], **GREEDY)
            third.run()
            assert third.tokens[request] == expected, f"a later engine: {third.tokens[request]}, alone {expected}"

    @contextmanager
    def _limit(self, what: str) -> Iterator[None]:
        try:
            with time_limit(self.timeout_s, what):
                yield
        except OutOfTimeError as error:
            raise AssertionError(f"no hanging: {error}") from error


def add_traffic(driver: Driver, source: random.Random) -> None:
    """Ten requests that use what a worker can do."""
    shared = [source.randrange(300) for _ in range(20)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 1.0, "min_tokens": 3, "stop_token_ids": list(range(0, 300, 3))},
        {"temperature": 0.0, "logit_bias": {5: 3.0}, "prompt_logprobs": 1},
    ]
    for number in range(10):
        prompt = shared[: source.choice((0, 8, 17))] + [source.randrange(300) for _ in range(source.randint(1, 40))]
        driver.add(prompt, seed=source.randrange(1000), max_tokens=source.randint(1, 24), **kinds[number % len(kinds)])


def _empty_plan(driver: Driver, step_id: int) -> StepPlan:
    deltas = [BlockDelta([], [], []) for _ in driver.info.kv.groups]
    return StepPlan(step_id=step_id, slots=[], num_tokens=[], sample=[], blocks=deltas)


def _check_same(plan: StepPlan, result: StepResult, expected: StepResult) -> None:
    what = f"result of step {plan.step_id} ({len(plan.slots)} rows)"
    for column in ("counts", "token_ids"):
        got, right = getattr(result, column), getattr(expected, column)
        assert got == right, f"tokens: the {what} has {column} {got}, one worker {right}"
    assert set(result.errors) == set(expected.errors), f"errors: the {what} has {result.errors}, not {expected.errors}"
    for kind in ("logprobs", "prompt_logprobs"):
        got, right = getattr(result, kind), getattr(expected, kind)
        assert set(got) == set(right), f"{kind}: the {what} has them for rows {sorted(got)}, not {sorted(right)}"
        for row in right:
            assert _same_logprobs(got[row], right[row]), (
                f"{kind}: the {what} has {got[row]} in row {row}, not {right[row]}"
            )


def _same_logprobs(got: list[TokenLogprobs], right: list[TokenLogprobs]) -> bool:
    return len(got) == len(right) and all(
        one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        for one, other in zip(got, right, strict=True)
    )


def _whole_text(error: BaseException | None) -> str:
    """The texts of an exception and of all it was raised from."""
    texts = []
    while error is not None:
        texts.append(f"{error} {' '.join(getattr(error, '__notes__', ()))}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
