"""`OutputLengths`: how many tokens a request will generate, judged by those that finished before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from interlace.interfaces.scheduler import RequestView

CONFIDENCE = 4.0
"""Observations a group needs to count as much as the wider group around it."""
MAX_GROUPS = 1024
"""Groups remembered; a label may take any number of values."""


class Mean(NamedTuple):
    """A running mean."""

    num_seen: int = 0
    value: float = 0.0


class OutputLengths:
    """Means of output length by kind of request, from the general to the particular.

    Requests are grouped three times: all of them, those with a prompt of about the same length (the same power of
    two), and among these the ones with the same value of one label. A prediction starts from `prior` and goes through
    the groups, each pulling it towards its own mean the more, the more it has seen (shrinkage). So a new group
    borrows from the wider one, and a well-known group speaks for itself. After `memory` observations the newer ones
    weigh exponentially more, so that means follow a changing workload.
    """

    def __init__(self, prior: float, memory: int, label: str) -> None:
        self._prior = prior
        self._memory = memory
        self._label = label
        self._means: dict[tuple[object, ...], Mean] = {}  # the group seen last comes last

    def learn(self, request: RequestView) -> None:
        """Take in a finished request. One that never generated says nothing, and neither does a fixed length."""
        if not request.num_output_tokens or has_fixed_length(request):
            return
        for group in self._groups(request):
            count, value = self._means.pop(group, Mean())
            count = min(count + 1, self._memory)
            self._means[group] = Mean(count, value + (request.num_output_tokens - value) / count)
        while len(self._means) > MAX_GROUPS:
            del self._means[next(iter(self._means))]

    def predict(self, request: RequestView) -> float:
        """Output tokens of the whole request, as far as they can be known on its arrival."""
        if has_fixed_length(request):
            return float(request.max_tokens)
        tokens = self._prior
        for group in self._groups(request):
            count, value = self._means.get(group, Mean())
            tokens = (CONFIDENCE * tokens + count * value) / (CONFIDENCE + count)
        return min(max(tokens, request.params.min_tokens), request.max_tokens)

    def _groups(self, request: RequestView) -> Iterator[tuple[object, ...]]:
        size = request.num_prompt_tokens.bit_length()
        yield ()
        yield (size,)
        if self._label:
            yield (size, request.labels.get(self._label))


def has_fixed_length(request: RequestView) -> bool:
    """Whether only `max_tokens` can end the request."""
    params = request.params
    return params.ignore_eos and not params.stop and not params.stop_token_ids
