"""A policy put together in the configuration: first come, first served, except that orderings say who is first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from interlace.interfaces.ordering import Ordering
from interlace.interfaces.scheduler import RequestView
from interlace.plugins.schedulers.fcfs import Fcfs


class Ordered(Fcfs):
    """Waiting requests and victims are taken by the first ordering, among equals by the second, and so on; what still
    ties, by arrival. Free of starvation if the first ordering is (see `Ordering.starvation_free`)."""

    class Options(BaseModel):
        """Options of `ordered`. Those of the orderings stand under `orderings.options`."""

        model_config = ConfigDict(extra="forbid")

        order: list[str] = Field(
            ["priority", "fcfs"],
            min_length=1,
            description="Orderings, most important first; each decides where those before it tie.",
        )

    uses: ClassVar[Mapping[str, str]] = {"order": "orderings"}
    starvation_free = False

    def __init__(self, options: BaseModel, order: Sequence[Ordering]) -> None:
        """`order` are the orderings that the option names."""
        super().__init__(options)
        self.starvation_free = order[0].starvation_free
        self._functions = [ordering.key for ordering in order]
        self._keys: dict[str, tuple[Any, ...]] = {}

    def order_key(self, request: RequestView) -> tuple[Any, ...]:
        """Asked of the orderings once per request and kept, so it is fixed for life whatever they do."""
        key = self._keys.get(request.id)
        if key is None:
            key = self._keys[request.id] = tuple([function(request) for function in self._functions])
        return key

    def on_finish(self, request: RequestView, now: float) -> None:
        self._keys.pop(request.id, None)
