"""Collects what is new for the front until it is sent as one `StepOutput`."""

from __future__ import annotations

from interlace.messages import FinishInfo, StepOutput, StepStats, TokenLogprobs


class OutputBuffer:
    """News of requests since the last `take`. Falsy when there is none."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._request_ids: list[str] = []
        self._counts: list[int] = []
        self._token_ids: list[int] = []
        self.finished: dict[str, FinishInfo] = {}
        self.first_scheduled: dict[str, float] = {}
        self.cached_tokens: dict[str, int] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}

    def __bool__(self) -> bool:
        return bool(self._request_ids or self.finished)

    def add_token(self, request_id: str, token_id: int) -> None:
        """`add_tokens` for the one token of an ordinary step."""
        self._request_ids.append(request_id)
        self._counts.append(1)
        self._token_ids.append(token_id)

    def add_tokens(self, request_id: str, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        self._request_ids.append(request_id)
        self._counts.append(len(tokens))
        self._token_ids += tokens
        if logprobs is not None:
            self.logprobs[request_id] = logprobs[: len(tokens)]

    def take(self, step_id: int, now: float, stats: StepStats | None) -> StepOutput:
        """Everything collected, as one message; the buffer is empty afterwards."""
        output = StepOutput(
            step_id=step_id,
            now=now,
            request_ids=self._request_ids,
            counts=self._counts,
            token_ids=self._token_ids,
            finished=self.finished,
            first_scheduled=self.first_scheduled,
            cached_tokens=self.cached_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            stats=stats,
        )
        self._clear()
        return output
