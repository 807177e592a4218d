"""The contract of executors (version 1): run steps, in order, on whatever hardware and however many processes.

The engine core sees nothing else of the machine. Built in: `uniprocess`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import BaseModel, ConfigDict

from interlace.kv.specs import KVCacheConfig

if TYPE_CHECKING:
    from interlace.messages import StepPlan, StepResult
    from interlace.spec import ResolvedSpec
    from interlace.worker.place import Place


class Selection(msgspec.Struct, frozen=True):
    """One choice made while starting, and why; shown in the start-up log and by `interlace config plan`."""

    kind: str
    name: str
    reason: str


class ExecutorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a started executor offers the engine core."""

    kv: KVCacheConfig
    """KV groups and the number of blocks; the bytes of a block are those of all ranks together."""
    max_in_flight: int = 1
    """Steps that may be submitted before the first one's result is taken."""
    feeds_tokens: bool = True
    """Whether a sampled token reaches the next step on the device. If false, a request with a sample in flight is
    not planned again until the result is in."""
    num_stages: int = 1
    """Pipeline stages: so many steps run at a time, each on another part of the machine, and end one after the other.
    Where `feeds_tokens` is false, the core deals the decoding requests out over as many steps, so that no stage waits
    while all requests are in one; `max_in_flight` is at least as large."""
    selections: tuple[Selection, ...] = ()
    timings: dict[str, float] = {}
    """Seconds of the start by part: `import`, `weights`, `cache`, …"""


WORKER_DIED = "worker_died"
"""Kind of the event that tells of a worker's death: the engine asks `check_health`, also while it is idle."""


class ExecutorEvent(msgspec.Struct, frozen=True):
    """Something that happened outside a step; `kind` is an open name, `worker_died` and `progress` first."""

    kind: str
    message: str
    detail: dict[str, Any] = {}


class Executor(ABC):
    """Runs step plans. Called from one thread; `on_event` may be called from any.

    Steps run in the order of submission on every rank. A step that fails fails its successors already submitted. The
    slots such a plan released are not said again, so a worker takes an admission to a slot it believes taken.
    """

    class Options(BaseModel):
        """Typed options; a subclass replaces this."""

        model_config = ConfigDict(extra="forbid")

    def __init__(self, options: BaseModel) -> None:
        self.options: Any = options

    @abstractmethod
    def start(self, spec: ResolvedSpec, on_event: Callable[[ExecutorEvent], None]) -> ExecutorInfo:
        """Load the model, size and allocate the KV cache. Raises with the true cause when that fails."""

    def places(self, spec: ResolvedSpec) -> Sequence[Place]:
        """The ranks that a start with `spec` makes, in order, for `interlace config plan`. By default the only one.

        Raises `ConfigError` naming the option that does not fit."""
        from interlace.worker.place import Place

        return (Place(),)

    @abstractmethod
    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Run a step after all earlier ones. The future carries the step's exception if it failed."""

    def control(self, operation: str, **arguments: Any) -> Any:
        """Run a named operation between steps, ordered with them. The base class knows none.

        Raises `ValueError` naming the operation when the executor does not offer it."""
        raise ValueError(f"executor {type(self).__name__} offers no operation '{operation}'")

    def check_health(self) -> None:
        """Raise if the executor can no longer run steps. Cheap; may be called at any time."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop everything and free all resources. May be called twice, and after a failed `start`."""
