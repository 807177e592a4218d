"""The contract of orderings (version 1): one reason why a request comes before another, small enough to combine.

An ordering is not a policy: it plans nothing. A scheduler that names orderings in its options (`Scheduler.uses`) sorts
by several of them, from any packages: by the first, among equals by the second, and so on. Built in: `ordered`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from interlace.interfaces.scheduler import RequestView


class Ordering(ABC):
    """A sort key with options. One instance lives in the engine core and is called from one thread.

    An ordering only has effect where those before it leave ties. One with fine keys (a time, a count of tokens) leaves
    few, so coarse orderings belong in front, and a fine one may offer an option that makes its keys coarse.
    """

    class Options(BaseModel):
        """Typed options; a subclass replaces this. `self.options` is a validated instance."""

        model_config = ConfigDict(extra="forbid")

    starvation_free: bool = False
    """Declares that behind any request only finitely many later ones get a key smaller than *or equal to* its own,
    however many arrive; it may depend on the options. A combination is free of starvation if its first ordering is:
    no later one can put back in front what the first has put behind. The claim of any other one says nothing about
    the combination (`fcfs` after `priority` without aging does not help who has a low priority)."""

    def __init__(self, options: BaseModel) -> None:
        self.options: Any = options

    @abstractmethod
    def key(self, request: RequestView) -> Any:
        """What `request` is sorted by, smaller first; comparable with the key of every other request.

        Called once in the life of a request, when it starts to wait: so a key cannot follow the clock or the progress
        of the request. Aging fits all the same: two requests that wait age alike, so "earlier for each second of
        waiting" is "later for each second of arrival"."""
