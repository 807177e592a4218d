"""From `StepOutput` to what users see: text, stop strings, log probabilities, usage, times.

Work per step is proportional to the requests with news in it.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterable

import msgspec

from interlace.engine.detokenizer import Detokenizer
from interlace.engine.input_processor import PreparedRequest
from interlace.engine.output_state import ActiveRequest, Sample, Sink
from interlace.errors import EngineDeadError, EngineRestartingError, InvalidRequestError
from interlace.messages import RequestOutput, RequestSummary, StepOutput
from interlace.tokenizer import Tokenizer


class Processed(msgspec.Struct):
    """What a step means for the front."""

    aborts: list[str]
    """Engine requests that ended here (a stop string) while the engine still runs them."""
    news: dict[Sink, list[ActiveRequest]]
    """Per sink: streaming requests with anything new, and all that finished."""
    summaries: list[RequestSummary]
    """Requests the engine has let go of."""
    started: list[ActiveRequest] = []
    """Requests that got their first token in this step."""
    gaps: dict[float, int] = {}
    """Time (`Clock.now()`) of the token before → how many samples got their next token in this step. Samples that run
    together share that time, so this is short."""

    def tell(self, request: ActiveRequest) -> None:
        """Put a request with news on its sink's list."""
        if request.sink in self.news:
            self.news[request.sink].append(request)
        else:
            self.news[request.sink] = [request]


class OutputProcessor:
    """Keeps the state of all active requests. Thread-safe: engine output comes from one thread, takers from others.

    A request stays registered until the engine has reported the end of all its samples, so that its id cannot be used
    again too early, and tokens that were under way when a stop string was found are recognised and dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._lock = threading.Lock()
        self._requests: dict[str, ActiveRequest] = {}
        self._samples: dict[str, tuple[ActiveRequest, Sample]] = {}
        self._failure: EngineDeadError | None = None
        self.num_waiting = 0
        """Samples that no step has computed anything of yet."""

    @property
    def num_active(self) -> int:
        """Samples the engine has not reported the end of."""
        return len(self._samples)

    def add(self, prepared: PreparedRequest, sink: Sink, streaming: bool) -> ActiveRequest:
        """Register before the engine hears of the request. Raises `InvalidRequestError` when the id is taken and
        `EngineDeadError` when the engine is gone."""
        request = ActiveRequest(prepared, self._detokenizer, sink, streaming)
        with self._lock:
            if self._failure is not None:
                raise dead_again(self._failure)
            taken = next((s.engine_id for s in request.samples if s.engine_id in self._samples), None)
            if taken is not None or prepared.id in self._requests:
                raise InvalidRequestError(f"request id '{taken or prepared.id}' is in use: ids must be unique")
            self._requests[request.id] = request
            for sample in request.samples:
                self._samples[sample.engine_id] = (request, sample)
            self.num_waiting += len(request.samples)
        return request

    def discard(self, request: ActiveRequest) -> None:
        """Forget a request that never reached the engine."""
        with self._lock:
            if self._requests.get(request.id) is request:
                self._forget(request)

    def process(self, step: StepOutput) -> Processed:
        """Take in one step."""
        done = Processed([], {}, [])
        with self._lock:
            self._note_admissions(step)
            news: dict[ActiveRequest, bool] = {}  # touched requests; whether any of their samples ended
            self._append_tokens(step, news, done)
            for engine_id, info in step.finished.items():
                found = self._samples.get(engine_id)
                if found is None:
                    continue
                request, sample = found
                if sample.finish_reason is None or request in news:
                    news[request] = True
                sample.finish(info)
                request.note_finish(info)
                if request.released:
                    news[request] = True
            for request, ended in news.items():
                if ended:
                    self._close(request, step.now, done)
                else:
                    done.tell(request)
        return done

    def _note_admissions(self, step: StepOutput) -> None:
        for engine_id, when in step.first_scheduled.items():
            if found := self._samples.get(engine_id):
                request, sample = found
                self._note_start(sample)
                if request.metrics.first_scheduled_time is None:
                    request.metrics.first_scheduled_time = when
        for engine_id, count in step.cached_tokens.items():
            # Later siblings find the prompt of the first in the cache; what the user saved is the first one's.
            if (found := self._samples.get(engine_id)) and found[0].cached_tokens is None:
                found[0].cached_tokens = count
        for engine_id, entries in step.prompt_logprobs.items():
            if found := self._samples.get(engine_id):
                found[0].add_prompt_logprobs(entries)

    def _append_tokens(self, step: StepOutput, news: dict[ActiveRequest, bool], done: Processed) -> None:
        """All that is done for every token, on the engine's thread or its receiver's: short for plain samples."""
        samples, finished, tokens, now, end = self._samples, step.finished, step.token_ids, step.now, 0
        previous_times: list[float] = []
        for engine_id, count in zip(step.request_ids, step.counts, strict=True):
            start, end = end, end + count
            found = samples.get(engine_id)
            if found is None or not count:
                continue
            request, sample = found
            if sample.finish_reason is not None:
                continue
            previous, sample.last_token_time = sample.last_token_time, now
            if previous is not None:
                previous_times.append(previous)
            elif request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
                done.started.append(request)
            request.metrics.last_token_time = now
            if sample.is_plain and engine_id not in finished:
                sample.token_ids += tokens[start:end]
            else:
                info = finished.get(engine_id)
                if sample.append(tokens[start:end], step.logprobs.get(engine_id), info):
                    news[request] = True
                    if info is None:
                        done.aborts.append(engine_id)
            if request.streaming:
                news.setdefault(request, False)
        done.gaps = dict(Counter(previous_times))

    def _close(self, request: ActiveRequest, now: float, done: Processed) -> None:
        """Pass on the news of a request of which a sample ended, and let it go once the engine has."""
        ended_now = request.finished and request.metrics.finished_time is None
        if ended_now:
            request.metrics.finished_time = now
        if ended_now or (request.streaming and any(sample.has_news for sample in request.samples)):
            done.tell(request)
        if request.released:
            done.summaries.append(request.summary())
            self._forget(request)

    def _forget(self, request: ActiveRequest) -> None:
        self._requests.pop(request.id, None)
        for sample in request.samples:
            self._samples.pop(sample.engine_id, None)
            self._note_start(sample)

    def _note_start(self, sample: Sample) -> None:
        """It waits no longer: something of it was computed, or never will be."""
        if not sample.started:
            sample.started = True
            self.num_waiting -= 1

    def take(self, request: ActiveRequest) -> RequestOutput | None:
        """The delta since the last call, or None. Raises `EngineDeadError` if the engine died under the request."""
        with self._lock:
            raise_failure(request)
            return request.take()

    def whole(self, request: ActiveRequest) -> RequestOutput:
        """Everything so far. Raises `EngineDeadError` if the engine died under the request."""
        with self._lock:
            raise_failure(request)
            if not request.finished:
                return request.whole()
        return request.whole()  # nothing changes any more, and a long answer takes a while to decode

    def abort(self, request: ActiveRequest, now: float) -> list[str]:
        """End a request for its user, now; returns the ids to abort in the engine. No news is delivered."""
        with self._lock:
            running = [sample for sample in request.samples if not sample.released]
            for sample in running:
                sample.abort()
            if request.metrics.finished_time is None:
                request.metrics.finished_time = now
            return [sample.engine_id for sample in running]

    def find(self, request_id: str) -> ActiveRequest | None:
        with self._lock:
            return self._requests.get(request_id)

    def fail(self, error: EngineDeadError, now: float, engine_ids: Iterable[str] | None = None) -> Processed:
        """The engine is gone: every active request fails with `error`, and so does every later one unless a new engine
        is being started. With `engine_ids`, only the requests of which these are samples fail."""
        done = Processed([], {}, [])
        with self._lock:
            if engine_ids is not None:
                found = [self._samples[engine_id][0] for engine_id in engine_ids if engine_id in self._samples]
                lost = list(dict.fromkeys(found))
            else:
                lost = list(self._requests.values())
                if not isinstance(error, EngineRestartingError):
                    self._failure = self._failure or error
            for request in lost:
                request.failure = error
                if not request.finished:
                    request.metrics.finished_time = now
                    done.tell(request)
                done.summaries.append(request.summary())
                self._forget(request)
        return done


def raise_failure(request: ActiveRequest) -> None:
    """Raise what the engine died of under an unfinished request, if it did."""
    if request.failure is not None and not request.finished:
        raise dead_again(request.failure)


def dead_again(error: EngineDeadError) -> EngineDeadError:
    """A fresh error with the same text and cause: one instance raised in several threads would mix their traces."""
    fresh = copy.copy(error).with_traceback(None)
    fresh.__cause__ = error.__cause__
    return fresh
