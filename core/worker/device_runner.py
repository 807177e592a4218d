"""`DeviceRunner`: the model runner of a GPU. The host runs ahead of the device, up to `max_in_flight` steps.

Submitting a step only hands work to the device: one packed copy of what the host knows, then the model, sampling and a
copy of the tokens back. What a step samples feeds the next one on the device, so the host needs a token only in order
to report it. Steps of decoding requests run as device graphs (`interlace.worker.graphs`), others kernel by kernel.

Log probabilities of the tokens travel with them.

A request that asks for more (logits processors, penalties, log probabilities of the prompt, …) needs the host between
model and sampling. Steps with such a request wait for all earlier steps and then for themselves; its
neighbours in them are sampled on the device as always, so that their tokens do not depend on the company they keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from interlace.interfaces.attention import AttentionBackend
from interlace.interfaces.kernels import Kernels
from interlace.interfaces.model import LayerCache, Model
from interlace.messages import SampledTokens, StepPlan, StepResult, TokenLogprobs
from interlace.sampling.distribution import take_rows
from interlace.sampling.sampler import NOT_A_NUMBER, SampledRows, Sampler
from interlace.worker.batch import ForwardBatch
from interlace.worker.device_batch import DeviceBatch, StepInputs
from interlace.worker.device_forward import DeviceForward, Logits
from interlace.worker.graphs import DecodeGraphs, Ending
from interlace.worker.model_runner import ModelRunner
from interlace.worker.sampled import reported
from interlace.worker.step_buffers import Columns
from interlace.worker.streams import Completion, Stream, Work


class StepFuture(Future[StepResult]):
    """Done when somebody asks: no thread has to wait for the device in the meantime. For one thread; `timeout`s are not
    kept, since the device cannot be waited for with one."""

    def __init__(self, settle: Callable[[StepFuture], None]) -> None:
        super().__init__()
        self._settle = settle
        self.set_running_or_notify_cancel()  # what the device was given cannot be taken back

    def result(self, timeout: float | None = None) -> StepResult:
        self._settle(self)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._settle(self)
        return super().exception(0)


class _InFlight:
    """A step that was submitted and whose future is open."""

    def __init__(self, plan: StepPlan, future: StepFuture, started: float) -> None:
        self.plan = plan
        self.future = future
        self.started = started
        self.error: Exception | None = None
        self.completion: Completion | None = None
        self.finish: Callable[[], StepResult]
        """Makes the result, once the step is complete."""


class DeviceRunner(ModelRunner):
    """Runs steps in order. Used from one thread."""

    def __init__(
        self,
        stream: Stream,
        model: Model,
        layers: Mapping[int, LayerCache],
        backends: Sequence[AttentionBackend],
        kernels: Kernels,
        batch: DeviceBatch,
        sampler: Sampler,
        now: Callable[[], float],
        *,
        max_tokens: int,
        max_model_len: int,
        max_in_flight: int = 2,
        graph_sizes: Sequence[int] | None = (),
    ) -> None:
        """`graph_sizes`: as for `DecodeGraphs`; None: no graphs."""
        super().__init__(model, layers, backends, batch, sampler, now)
        self.max_in_flight = max_in_flight
        self._device_batch = batch
        self._host_sampler = sampler
        self._stream = stream
        depth = max_in_flight + 1
        self._forward = DeviceForward(
            stream, model, layers, backends, kernels, batch, max_tokens, sampler.vocab_size, depth
        )
        self._logits = Logits()
        self.graphs: DecodeGraphs | None = None
        if graph_sizes is not None:
            self.graphs = DecodeGraphs(
                stream,
                graph_sizes,
                batch.max_num_seqs,
                max_model_len,
                self._forward.graph_work,
                now,
            )
        self._in_flight: deque[_InFlight] = deque()
        self._failed = False  # a step failed and whoever submitted it has not heard of it
        self._dead: Exception | None = None
        self._settled_at = 0.0

    # ── submitting ────────────────────────────────────────────────────────────────────────────────────────────

    def execute(self, plan: StepPlan, sampled: Sequence[SampledTokens] = ()) -> StepResult:
        """Run one step and wait for it."""
        return self.submit(plan).result()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepFuture:
        """Hand a step to the device, after all earlier ones. What goes wrong is in the future."""
        while len(self._in_flight) >= self.max_in_flight:
            self._settle_oldest()
        step = _InFlight(plan, StepFuture(self._settle), self._now())
        self._in_flight.append(step)
        if self._failed:
            step.error = RuntimeError(f"step {plan.step_id} was not run, because a step before it failed")
            return step.future
        try:
            with self._stream.current():
                self._launch(step)
        except Exception as error:
            step.error = error
            self._failed = True
        return step.future

    def profile(self, plan: StepPlan) -> dict[str, float]:
        """Run one step; seconds until it was handed over, and until it was complete."""
        began = self._now()
        future = self.submit(plan)
        handed = self._now()
        future.result()
        return {"submit": handed - began, "wait": self._now() - handed}

    @property
    def graph_seconds(self) -> float:
        """Spent on capturing graphs so far."""
        return 0.0 if self.graphs is None else self.graphs.seconds

    def check_health(self) -> None:
        """Raise if the device does no more work."""
        if self._dead is not None:
            raise RuntimeError(f"the device {self._stream.device} does no more work: {self._dead}") from self._dead

    def close(self) -> None:
        """Settle what is in flight and let go of the device."""
        while self._in_flight:
            self._settle_oldest()
        self.graphs = None
        self._stream.close()

    def _launch(self, step: _InFlight) -> None:
        plan, batch = step.plan, self._device_batch
        self._apply(plan)
        tables = batch.take_news()
        works: list[Work] = [self._forward.news(tables)] if tables else []
        if not plan.slots:
            self._hand_over(step, works)
            step.finish = lambda: self._take(step, [], [], [])
            return
        inputs = batch.flatten(plan)
        sampling = batch.sampling_columns(inputs)
        batch.advance(plan)
        slots = inputs.out_slots.tolist()
        on_host = self._host_sampler.rows_on_host(slots)
        ending = Ending(batch.sampling_mode(inputs), bool((sampling["num_logprobs"] >= 0).any()))
        if on_host or self._reports_prompts(inputs):
            self._launch_with_host(step, inputs, sampling, ending, works, slots, on_host)
            return
        works.append(self._step_work(inputs, sampling, ending))
        fetch, host = self._forward.fetch(len(slots), ending)
        works.append(fetch)
        self._hand_over(step, works)

        def finish() -> StepResult:
            logprobs = reported(host.logprobs, inputs.rows, sampling["num_logprobs"]) if ending.reports else {}
            return self._take(step, inputs.rows, slots, host.token_ids[: len(slots)].tolist(), {}, logprobs)

        step.finish = finish

    def _reports_prompts(self, inputs: StepInputs) -> bool:
        """Whether a row computes a prompt's token that predicts one whose log probability is asked for."""
        return bool(self._prompt_logprobs) and any(
            slot in self._prompt_logprobs and context + 1 < self._device_batch.num_prompt_tokens[slot]
            for slot, context in zip(inputs.slots.tolist(), inputs.context_lens.tolist(), strict=True)
        )

    def _step_work(self, inputs: StepInputs, sampling: Columns, ending: Ending) -> Work:
        """The step as a device graph, if there is one for it, or kernel by kernel."""
        if inputs.is_decode and self.graphs is not None:
            key = self.graphs.key(len(inputs.rows), inputs.longest, ending)
            replay = None if key is None else self.graphs.find(key)
            if key is not None and replay is not None:
                return self._forward.decode(inputs, sampling, key, replay, self._logits)
        return self._forward.step(inputs, sampling, ending, self._logits)

    def _hand_over(self, step: _InFlight, works: Sequence[Work]) -> None:
        @torch.inference_mode()
        def work() -> None:
            for part in works:
                part()

        step.completion = self._stream.submit(work)

    # ── steps that need the host ──────────────────────────────────────────────────────────────────────────────

    def _launch_with_host(
        self,
        step: _InFlight,
        inputs: StepInputs,
        sampling: Columns,
        ending: Ending,
        works: list[Work],
        slots: list[int],
        on_host: list[int],
    ) -> None:
        """Run the step to its end: model on the device, then sampling here and there."""
        works.append(self._step_work(inputs, sampling, Ending(None)))
        self._hand_over(step, works)
        while self._in_flight[0] is not step:  # the tokens of earlier steps are part of the histories
            self._settle_oldest()
            if step.future.done():
                return
        assert step.completion is not None
        step.completion.wait()
        prompt_logprobs = self._prompt_logprobs_of(step.plan, inputs)
        token_ids: list[int] = []
        sampled, logprobs = SampledRows([], {}, {}), {}
        if slots:
            logits = self._logits.logits[: len(slots)]  # a graph may have computed padding, too
            given = take_rows(logits, on_host) if on_host else None
            if len(on_host) < len(slots):
                tokens, columns = self._forward.sample(logits, sampling, ending)
                token_ids = tokens.tolist()
                if columns is not None:
                    counts = sampling["num_logprobs"].copy()
                    counts[on_host] = -1  # those follow from the host's token
                    logprobs = reported(columns, inputs.rows, counts)
            if given is not None:
                own = [slots[index] for index in on_host]
                sampled = self._host_sampler.sample(given, own, self._batch.histories(own))
                token_ids = token_ids or [0] * len(slots)
                for index, token_id in zip(on_host, sampled.token_ids, strict=True):
                    token_ids[index] = token_id
            self._forward.feed(slots, [max(0, token_id) for token_id in token_ids])
        errors = {inputs.rows[on_host[index]]: message for index, message in sampled.errors.items()}
        logprobs |= {inputs.rows[on_host[index]]: [entry] for index, entry in sampled.logprobs.items()}
        result = self._take(step, inputs.rows, slots, token_ids, errors, logprobs, prompt_logprobs)
        step.finish = lambda: result

    def _prompt_logprobs_of(self, plan: StepPlan, inputs: StepInputs) -> dict[int, list[TokenLogprobs]]:
        if not self._reports_prompts(inputs):
            return {}
        lengths = ForwardBatch(self._logits.hidden, self._logits.hidden, inputs.query_lens, inputs.context_lens, [], [])
        return self._compute_prompt_logprobs(plan, lengths, self._logits.hidden)

    # ── settling ──────────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, future: StepFuture) -> None:
        """Complete steps in order up to that of `future`."""
        while not future.done():
            self._settle_oldest()

    @torch.inference_mode()
    def _settle_oldest(self) -> None:
        step = self._in_flight.popleft()
        try:
            if step.error is not None:
                raise step.error
            assert step.completion is not None
            step.completion.wait()
            result = step.finish()
        except Exception as error:
            self._fail(step, error)
        else:
            step.future.set_result(result)

    def _fail(self, step: _InFlight, error: Exception) -> None:
        """The step failed, and with it all that were submitted after it."""
        try:
            self._stream.synchronize()  # what they still do on the device ends before anything new begins
        except Exception as broken:
            self._dead = broken
        followers = list(self._in_flight)
        self._in_flight.clear()
        self._failed = False
        step.future.set_exception(error)
        for follower in followers:
            text = f"step {follower.plan.step_id} is void, because step {step.plan.step_id} before it failed"
            follower.future.set_exception(RuntimeError(text))

    def _take(
        self,
        step: _InFlight,
        rows: Sequence[int],
        slots: list[int],
        token_ids: list[int],
        errors: dict[int, str] | None = None,
        logprobs: dict[int, list[TokenLogprobs]] | None = None,
        prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None,
    ) -> StepResult:
        """The step's result; the batch hears of its tokens. `slots` and `token_ids` belong to `rows`; -1: none."""
        errors = errors or {}
        if min(token_ids, default=0) < 0:
            for row, token_id in zip(rows, token_ids, strict=True):
                if token_id < 0:
                    errors.setdefault(row, NOT_A_NUMBER)
            sound = [index for index, token_id in enumerate(token_ids) if token_id >= 0]
            slots, token_ids = [slots[index] for index in sound], [token_ids[index] for index in sound]
        if token_ids:
            self._device_batch.hear(SampledTokens(step.plan.step_id, slots, token_ids))
        counts = [0] * len(step.plan.slots)
        for row in rows:
            counts[row] = int(row not in errors)
        now = self._now()
        began, self._settled_at = max(step.started, self._settled_at), now
        return StepResult(
            step_id=step.plan.step_id,
            counts=counts,
            token_ids=token_ids,
            duration=now - began,
            logprobs={row: entries for row, entries in (logprobs or {}).items() if row not in errors},
            prompt_logprobs=prompt_logprobs or {},
            errors=errors,
            plugin_seconds=self._host_sampler.take_plugin_seconds(),
        )
