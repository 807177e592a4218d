"""Shortest predicted remaining work first, with aging."""

from __future__ import annotations

from interlace.interfaces.scheduler import Outcome, RequestView, Scheduler, StepBuilder
from pydantic import BaseModel

from interlace_predictive.lengths import OutputLengths
from interlace_predictive.options import PredictiveOptions


class ShortestPredicted(Scheduler):
    """Admits the waiting request with the least predicted work; when blocks run short, the most work left gives way.

    Running requests go on: to interrupt one for a shorter one would cost its computation again.
    """

    class Options(PredictiveOptions):
        """Stated in a module of their own."""

    starvation_free = True  # work is bounded, so whoever arrives late enough ranks behind; and nobody is passed over

    def __init__(self, options: BaseModel) -> None:
        super().__init__(options)
        self._lengths = OutputLengths(self.options.prior, self.options.memory, self.options.label)
        self._predicted: dict[str, float] = {}  # by request, as it was on its arrival: an order key must not change

    def order_key(self, request: RequestView) -> float:
        """Predicted work on arrival. Requests that wait age alike, so the time of arrival stands in for aging."""
        return self._rank(request, request.num_prompt_tokens, self._predict(request))

    def plan(self, step: StepBuilder) -> None:
        for request in step.continue_running():
            while step.schedule(request) is Outcome.BLOCKS:
                victim = max(reversed(step.running), key=self._rank_of_rest)  # among equals, the last one admitted
                step.preempt(victim)
                if victim is request:
                    break
        for request in step.waiting:
            if step.schedule(request) in (Outcome.BLOCKS, Outcome.BUDGET, Outcome.SEATS):
                break

    def on_finish(self, request: RequestView, now: float) -> None:
        self._lengths.learn(request)
        self._predicted.pop(request.id, None)

    def _predict(self, request: RequestView) -> float:
        if request.id not in self._predicted:
            self._predicted[request.id] = self._lengths.predict(request)
        return self._predicted[request.id]

    def _rank_of_rest(self, request: RequestView) -> float:
        """Like the order key, with the work that is left. A request that outlives its prediction has, as lengths with
        a long tail go, about as much before it as behind it."""
        generated = request.num_output_tokens
        rest = self._predict(request) - generated
        if rest <= 0:
            rest = min(generated, request.max_tokens - generated)
        return self._rank(request, max(0, request.num_prompt_tokens - request.num_computed_tokens), rest)

    def _rank(self, request: RequestView, prompt_tokens: int, output_tokens: float) -> float:
        work = output_tokens + prompt_tokens * self.options.prompt_cost
        return float(work + request.arrival_time * self.options.aging)
