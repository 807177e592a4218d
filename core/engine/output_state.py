"""One user request on its way out: what its samples have produced, and what its consumer has already taken.

Nothing is queued. The engine side adds to the state; the consumer takes what is new since it last took. A slow consumer
therefore gets fewer, larger deltas, and memory never exceeds one copy of the output.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from interlace.engine.detokenizer import Detokenizer, StopStrings
from interlace.engine.input_processor import PreparedRequest
from interlace.errors import EngineDeadError
from interlace.messages import (
    CompletionOutput,
    FinishInfo,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestSummary,
    SamplingParams,
    TokenLogprobs,
    Usage,
)

_SEVERITY = ("stop", "length", "abort", "error")
"""Finish reasons from best to worst: a request of several samples is summed up by its worst."""


class Sink(Protocol):
    """Where news of requests goes: one per consumer of several requests. Hashable by identity."""

    def deliver(self, requests: list[ActiveRequest]) -> None:
        """These have news. Called at most once per step, from the engine client's thread; must not block."""


class Sample:
    """One of the `n` answers as it grows.

    Text is made when somebody takes it, in the taker's thread: the engine's thread only notes the tokens. Stop strings
    are the exception, for they end requests: with them, text is made as the tokens come.
    """

    def __init__(self, engine_id: str, index: int, params: SamplingParams, detokenizer: Detokenizer) -> None:
        self.engine_id = engine_id
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.error_code = "error"
        self.released = False
        """Whether the engine has reported the end: nothing more will come."""
        self.token_ids: list[int] = []
        self.last_token_time: float | None = None
        self.started = False
        """Whether a step has computed anything of it."""
        self._params = params
        self._detokenizer = detokenizer
        self._stream = (
            detokenizer.stream(
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if params.detokenize
            else None
        )
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._pieces: list[str] = []
        self._num_decoded = 0  # tokens the stream has been given
        self._num_silent = 0  # tokens at the end whose text is no part of the answer
        self._flushed = False
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.is_plain = self._stops is None and self._logprobs is None
        """Whether a token that does not end the sample is only to be added to `token_ids`."""
        self._cumulative = 0.0
        self._taken_tokens = 0
        self._taken_pieces = 0
        self._taken_end = False

    @property
    def has_news(self) -> bool:
        return len(self.token_ids) > self._taken_tokens or (self.finish_reason is not None and not self._taken_end)

    def append(self, token_ids: list[int], logprobs: list[TokenLogprobs] | None, info: FinishInfo | None) -> bool:
        """Add the tokens of a step; `info` is the engine's word if it ended the request with them.

        Returns whether a stop string ended the sample: at the token that completes it; later ones are dropped."""
        if info is not None and info.reason == "stop" and not self._params.include_stop_str_in_output:
            self._num_silent = 1  # the token that ended the request
        last = len(self.token_ids) + len(token_ids) - self._num_silent
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if logprobs is not None and self._logprobs is not None:
                self._cumulative += logprobs[i].logprobs[0]
                self._logprobs.append(logprob_entry(logprobs[i], self._detokenizer))
            if self._stops is not None and len(self.token_ids) <= last:
                self._decode(self._stops)
            if self.finish_reason is not None:
                return True
        return False

    def finish(self, info: FinishInfo) -> None:
        """The engine ended the request; text that was held back is written (and may still complete a stop string)."""
        self.released = True
        self._end_stops()
        if self.finish_reason is None:
            self.finish_reason, self.stop_reason = info.reason, info.stop_reason
            self.error, self.error_code = info.error, info.error_code or "error"
            if info.reason == "error" and self.error is None:
                self.error = "the engine gave no reason"

    def abort(self) -> None:
        """The user ended the request; what was held back is written."""
        self._end_stops()
        self.finish_reason = self.finish_reason or "abort"

    def _end_stops(self) -> None:
        """Nothing more will come: search what was held back."""
        if self._stops is None or self.finish_reason is not None:
            return
        self._decode(self._stops, flush=True)
        if self._stops.matched is None:
            self._pieces.append(self._stops.flush())

    def _decode(self, stops: StopStrings | None, flush: bool = False) -> None:
        """Write the text of the tokens that have none yet, past the stop strings if there are any; `flush` at the
        end, when also what is no whole character is written."""
        if self._stream is None:
            return
        num_tokens = len(self.token_ids) - self._num_silent
        text = self._stream.push_all(self.token_ids[self._num_decoded : num_tokens])
        self._num_decoded = num_tokens
        if flush:
            text += self._stream.flush()
        # No stop string counts before min_tokens.
        if text and stops is not None and len(self.token_ids) > self._params.min_tokens:
            text = stops.push(text)
            if stops.matched is not None:
                self.finish_reason, self.stop_reason = "stop", stops.matched
        if text:
            self._pieces.append(text)

    def _catch_up(self) -> None:
        """Make the text that is due."""
        if self._stops is None and not self._flushed:
            self._flushed = self.finish_reason is not None
            self._decode(None, flush=self._flushed)

    def whole(self) -> CompletionOutput:
        self._catch_up()
        return self._output(0, 0)

    def take(self) -> CompletionOutput:
        """What is new since the last call."""
        self._catch_up()
        output = self._output(self._taken_tokens, self._taken_pieces)
        self._taken_tokens, self._taken_pieces = len(self.token_ids), len(self._pieces)
        self._taken_end = self.finish_reason is not None
        return output

    def _output(self, first_token: int, first_piece: int) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces[first_piece:]),
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            logprobs=None if self._logprobs is None else self._logprobs[first_token:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )


class ActiveRequest:
    """A user request between submission and its last output. Guarded by the lock of its `OutputProcessor`."""

    def __init__(self, prepared: PreparedRequest, detokenizer: Detokenizer, sink: Sink, streaming: bool) -> None:
        self.id = prepared.id
        self.sink = sink
        self.streaming = streaming
        """Whether the sink wants news of every step, or only of the end."""
        self.samples = [
            Sample(request.id, request.sample_index, request.params, detokenizer) for request in prepared.samples
        ]
        self.metrics = RequestMetrics(arrival_time=prepared.arrival_time)
        self.cached_tokens: int | None = None
        self.failure: EngineDeadError | None = None
        """Set when the engine died under the request."""
        self._prepared = prepared
        self._detokenizer = detokenizer
        self._num_preemptions = 0
        wanted = prepared.params.prompt_logprobs is not None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if wanted else None
        self._taken_prompt_logprobs = False

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def released(self) -> bool:
        """Whether the engine has reported the end of every sample."""
        return all(sample.released for sample in self.samples)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prepared.prompt_token_ids)

    @property
    def params(self) -> SamplingParams:
        return self._prepared.params

    @property
    def num_output_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    def note_finish(self, info: FinishInfo) -> None:
        self._num_preemptions += info.num_preemptions

    def add_prompt_logprobs(self, entries: list[TokenLogprobs]) -> None:
        if self._prompt_logprobs is None:
            return
        # A preempted prompt is computed again: positions already known are not added twice.
        missing = len(self._prepared.prompt_token_ids) - len(self._prompt_logprobs)
        self._prompt_logprobs.extend(logprob_entry(entry, self._detokenizer) for entry in entries[:missing])

    def whole(self) -> RequestOutput:
        """Everything so far."""
        return self._output([sample.whole() for sample in self.samples], self._prompt_logprobs)

    def take(self) -> RequestOutput | None:
        """What is new since the last call: the samples with news only; None if there are none."""
        outputs = [sample.take() for sample in self.samples if sample.has_news]
        if not outputs:
            return None
        prompt_logprobs = None if self._taken_prompt_logprobs else self._prompt_logprobs
        self._taken_prompt_logprobs = True
        return self._output(outputs, prompt_logprobs)

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.id,
            prompt=self._prepared.prompt,
            prompt_token_ids=self._prepared.prompt_token_ids,
            outputs=outputs,
            usage=Usage(
                prompt_tokens=len(self._prepared.prompt_token_ids),
                completion_tokens=self.num_output_tokens,
                cached_tokens=self.cached_tokens or 0,
            ),
            metrics=msgspec.structs.replace(self.metrics),
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
        )

    def summary(self) -> RequestSummary:
        """The finished request, for `on_request_finished`."""
        cut_off = "abort" if self.failure is None else "error"
        reasons = [sample.finish_reason or cut_off for sample in self.samples]
        codes = [sample.error_code for sample in self.samples if sample.finish_reason == "error"]
        if self.failure is not None:
            codes.append("engine_dead")
        known = [reason for reason in reasons if reason in _SEVERITY]
        return RequestSummary(
            request_id=self.id,
            finish_reason=max(known, key=_SEVERITY.index) if known else reasons[0],
            num_prompt_tokens=len(self._prepared.prompt_token_ids),
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.cached_tokens or 0,
            num_preemptions=self._num_preemptions,
            metrics=msgspec.structs.replace(self.metrics),
            labels=self._prepared.samples[0].labels,
            error_code=codes[0] if codes else None,
            finish_reasons=tuple(reasons),
            sample_lengths=tuple(len(sample.token_ids) for sample in self.samples),
            max_tokens=self._prepared.params.max_tokens or 0,
            priority=self._prepared.samples[0].priority,
        )


def logprob_entry(entry: TokenLogprobs, detokenizer: Detokenizer) -> dict[int, Logprob]:
    """One position for the user: the chosen token first, then the most likely ones in order."""
    found: dict[int, Logprob] = {}
    for i, (token_id, logprob) in enumerate(zip(entry.token_ids, entry.logprobs, strict=True)):
        # Entry 0 is the chosen token; entries 1, 2, … are those of rank 1, 2, …
        rank = entry.rank if i == 0 else i
        found.setdefault(token_id, Logprob(logprob, rank, detokenizer.token_text(token_id)))
    return found
