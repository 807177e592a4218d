"""The contract of schedulers (version 1): policy here, mechanism in `interlace.scheduling.StepBuilder`.

A scheduler composes one step at a time out of safe primitives. It chooses; it cannot break an invariant: whatever
`plan` does, no request is lost or scheduled twice, no block leaks, and all budgets hold.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from interlace.messages import SamplingParams


class Outcome(enum.Enum):
    """What `StepBuilder.schedule` did. Truthy only for `OK`; any other outcome changed nothing."""

    OK = "ok"
    BLOCKS = "blocks"
    """Not enough free KV blocks."""
    BUDGET = "budget"
    """The step's token budget is spent."""
    SEATS = "seats"
    """`max_num_seqs` requests are running."""
    NOT_READY = "not_ready"
    """Cannot run in this step: blocked, preempted in it, its next token being sampled, its next prefix block being
    computed in it; or, with pipeline stages, this step has its part of the decoding requests."""
    DONE = "done"
    """Already in this step, or finished."""

    def __bool__(self) -> bool:
        return self is Outcome.OK


class RequestView(Protocol):
    """What a policy may read of a request. Nothing here may be written by a policy."""

    @property
    def id(self) -> str: ...
    @property
    def arrival_time(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is stored, or will be once the steps under way are done."""
        ...

    @property
    def num_output_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def is_prefilling(self) -> bool:
        """More than one token is still to be computed before the next sample."""
        ...

    @property
    def params(self) -> SamplingParams: ...
    @property
    def labels(self) -> Mapping[str, str]: ...


class StepBuilder(Protocol):
    """The primitives a policy composes one step from. Valid only during the `plan` call it is given to."""

    @property
    def now(self) -> float:
        """Time of this step, in clock seconds."""
        ...

    @property
    def token_budget_left(self) -> int: ...
    @property
    def sequences_left(self) -> int:
        """How many more waiting requests could start running."""
        ...

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Requests that could be admitted, in arrival order or the scheduler's `order_key`; a snapshot."""
        ...

    @property
    def running(self) -> Sequence[RequestView]:
        """Requests that hold a seat, in order of admission; a snapshot."""
        ...

    def continue_running(self, order: Callable[[RequestView], Any] | None = None) -> Sequence[RequestView]:
        """Schedule every running request: decodes first, then partial prefills, each group in order of admission
        or by `order`. Returns those for which no KV block was free, and only those."""
        ...

    def schedule(self, request: RequestView, max_tokens: int | None = None) -> Outcome:
        """Put `request` into the step, with at most `max_tokens` tokens of it (for chunked prefill)."""
        ...

    def preempt(self, request: RequestView) -> int:
        """Take its seat and blocks from a running request (recompute preemption) and undo its place in this step.
        It goes back to the front of `waiting` and cannot be scheduled again in this step. Returns the number of
        KV blocks this freed now."""
        ...

    def reject(self, request: RequestView, reason: str) -> None:
        """End a request with a clear error to the client."""
        ...

    def fits(self, request: RequestView) -> bool:
        """Whether `schedule` would find the blocks, seat and budget; changes nothing."""
        ...

    def cached_tokens(self, request: RequestView) -> int:
        """Leading tokens of a waiting request that the prefix cache holds now; changes nothing."""
        ...

    def wake_at(self, time: float) -> None:
        """Ask to plan again at `time` even if nothing happens until then."""
        ...


class Progress(Protocol):
    """What one finished step changed, in bulk; given to `Scheduler.on_update`."""

    @property
    def duration(self) -> float:
        """Seconds the executor spent."""
        ...

    @property
    def requests(self) -> Sequence[RequestView]:
        """Requests that took part, in plan order."""
        ...

    @property
    def num_new_tokens(self) -> Sequence[int]:
        """Sampled tokens of each of them."""
        ...


class Scheduler(ABC):
    """A scheduling policy. `plan` is the only method one must write.

    One instance lives in the engine core and is called from one thread. It may keep state between calls.
    """

    class Options(BaseModel):
        """Typed options; a subclass replaces this. `self.options` is a validated instance."""

        model_config = ConfigDict(extra="forbid")

    uses: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Options that name plugins of other kinds, as option → kind: `{"order": "orderings"}`. The option is a name or a
    list of names. What it names is looked up, checked and given its own options like anything the configuration
    selects, and `__init__` gets the instances, in order, as a keyword argument called like the option."""

    starvation_free: bool = False
    """Declared by policies under which every request is planned eventually, whatever the traffic."""

    def __init__(self, options: BaseModel) -> None:
        self.options: Any = options

    @abstractmethod
    def plan(self, step: StepBuilder) -> None:
        """Compose one step. Called whenever something could run. Must not block; must not keep `step`."""

    def order_key(self, request: RequestView) -> Any:
        """Sort key of the waiting queue, smaller first, fixed for the life of a request. The default is arrival
        order. Overriding it makes `step.waiting` sorted by it (incrementally, not per step)."""
        return request.arrival_time

    def on_arrival(self, request: RequestView, now: float) -> None:
        """A request arrives; the first call about it, before `order_key`."""

    def on_update(self, progress: Progress, now: float) -> None:
        """A step finished; once per step."""

    def on_finish(self, request: RequestView, now: float) -> None:
        """A request ended, for whatever reason; the last call about it, after `on_update` of its last step."""
