"""`Feedback`: sampled tokens on their way from the rank that samples to all others, which hear of them with the next
plan: no collective, and nobody waits.
"""

from __future__ import annotations

from collections import deque

from interlace.messages import SampledTokens, StepPlan, StepResult


class Feedback:
    """An executor's record of results that the ranks have not been told of.

    `record` a result before its future is resolved, and hand what `take` returns to `Worker.execute` of every rank with
    the next plan: a plan never needs a token whose result the core has not seen (`ExecutorInfo.feeds_tokens` is
    false). The two may be called from different threads."""

    def __init__(self) -> None:
        self._news: deque[SampledTokens] = deque()

    def record(self, plan: StepPlan, result: StepResult) -> None:
        """`result` is what `plan` gave."""
        if result.token_ids:
            slots = [slot for slot, count in zip(plan.slots, result.counts, strict=True) for _ in range(count)]
            self._news.append(SampledTokens(plan.step_id, slots, result.token_ids))

    def take(self) -> list[SampledTokens]:
        """What was recorded since the last call, oldest first."""
        return [self._news.popleft() for _ in range(len(self._news))]
