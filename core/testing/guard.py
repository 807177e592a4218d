"""`CheckedPolicy`: runs a scheduling policy and stops it at the first thing its contract forbids.

In an engine a policy sees the core's own records, because a proxy per read would cost more than the policy. Here it
sees read-only proxies with exactly what `RequestView`, `StepBuilder` and `Progress` state, and whatever it does
besides is a `PolicyFault`, raised at the line that does it.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, NamedTuple

from interlace.interfaces.scheduler import Outcome, Progress, RequestView, Scheduler, StepBuilder
from interlace.request import RequestState
from interlace.scheduling.fallback import complete
from interlace.scheduling.step_builder import PolicyRunawayError
from interlace.scheduling.step_builder import StepBuilder as RealBuilder

READABLE = frozenset(name for name, member in vars(RequestView).items() if isinstance(member, property))
"""What a policy may read of a request."""
_BUILDER = ", ".join(sorted(name for name in vars(StepBuilder) if not name.startswith("_")))
_MANY = 64
"""Finished requests from which on it shows whether a policy forgets them."""


class PolicyFault(BaseException):
    """A policy broke its contract. Not an `Exception`, so that neither the core nor the policy forgives it."""


class ReadOnlyRequest:
    """A request as a policy may see it: what `RequestView` states, to be read only."""

    __slots__ = ("__state", "__weakref__")

    def __init__(self, state: RequestState) -> None:
        object.__setattr__(self, "_ReadOnlyRequest__state", state)

    def __getattribute__(self, name: str) -> Any:
        if name in READABLE:
            value = getattr(_state_of(self), name)
            return MappingProxyType(value) if isinstance(value, dict) else value
        if name.startswith("__") and name.endswith("__"):
            return object.__getattribute__(self, name)
        raise PolicyFault(
            f"read-only requests: the policy reads request.{name}, which RequestView does not have. "
            f"It has: {', '.join(sorted(READABLE))}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise PolicyFault(
            f"read-only requests: the policy writes request.{name}. What a policy notes about a request belongs into "
            "the policy: a dict by request.id, cleared in on_finish"
        )

    def __delattr__(self, name: str) -> None:
        raise PolicyFault(f"read-only requests: the policy deletes request.{name}")

    def __repr__(self) -> str:
        return repr(_state_of(self))


def _state_of(view: ReadOnlyRequest) -> RequestState:
    state: RequestState = object.__getattribute__(view, "_ReadOnlyRequest__state")
    return state


class CheckedStepBuilder:
    """One step under construction, as the contract states it and no more."""

    __slots__ = ("__policy", "__step", "__weakref__")

    def __init__(self, step: RealBuilder, policy: CheckedPolicy) -> None:
        object.__setattr__(self, "_CheckedStepBuilder__step", step)
        object.__setattr__(self, "_CheckedStepBuilder__policy", policy)

    @property
    def now(self) -> float:
        return self.__open().now

    @property
    def token_budget_left(self) -> int:
        return self.__open().token_budget_left

    @property
    def sequences_left(self) -> int:
        return self.__open().sequences_left

    @property
    def waiting(self) -> tuple[Any, ...]:
        return self.__views(self.__open().waiting)

    @property
    def running(self) -> tuple[Any, ...]:
        return self.__views(self.__open().running)

    def continue_running(self, order: Callable[[Any], Any] | None = None) -> tuple[Any, ...]:
        view = object.__getattribute__(self, "_CheckedStepBuilder__policy").view
        given = None if order is None else lambda state: order(view(state))
        return self.__views(self.__open().continue_running(given))

    def schedule(self, request: RequestView, max_tokens: int | None = None) -> Outcome:
        if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool)):
            raise PolicyFault(f"the builder: step.schedule(max_tokens={max_tokens!r}): a whole number or None is meant")
        return self.__open().schedule(self.__own(request, "schedule"), max_tokens)

    def preempt(self, request: RequestView) -> int:
        return self.__open().preempt(self.__own(request, "preempt"))

    def reject(self, request: RequestView, reason: str) -> None:
        if not isinstance(reason, str) or not reason:
            raise PolicyFault(f"the builder: step.reject(reason={reason!r}): the client is to be told why, in words")
        self.__open().reject(self.__own(request, "reject"), reason)

    def fits(self, request: RequestView) -> bool:
        return self.__open().fits(self.__own(request, "fits"))

    def cached_tokens(self, request: RequestView) -> int:
        return self.__open().cached_tokens(self.__own(request, "cached_tokens"))

    def wake_at(self, time: float) -> None:
        self.__open().wake_at(time)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise PolicyFault(
            f"the builder: the policy uses step.{name}, which StepBuilder does not have. It has: {_BUILDER}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise PolicyFault(f"the builder: the policy writes step.{name}; what it notes belongs into the policy")

    def __open(self) -> RealBuilder:
        if object.__getattribute__(self, "_CheckedStepBuilder__policy").builder is not self:
            raise PolicyFault("keeps no builder: the policy uses a builder after the call of plan that it was given to")
        step: RealBuilder = object.__getattribute__(self, "_CheckedStepBuilder__step")
        return step

    def __views(self, states: Iterable[RequestState]) -> tuple[Any, ...]:
        view = object.__getattribute__(self, "_CheckedStepBuilder__policy").view
        return tuple([view(state) for state in states])

    def __own(self, request: Any, method: str) -> RequestState:
        if not isinstance(request, ReadOnlyRequest):
            raise PolicyFault(f"the builder: step.{method} is given {request!r}, which is no request of this engine")
        return _state_of(request)


class CheckedProgress(NamedTuple):
    """What one step changed, as the contract states it."""

    duration: float
    requests: tuple[Any, ...]
    num_new_tokens: tuple[int, ...]


class _Known(NamedTuple):
    """What the guard keeps of an unfinished request."""

    view: ReadOnlyRequest
    params: Any
    labels: dict[str, str]


class CheckedPolicy(Scheduler):
    """The policy `policy`, guarded. Give it to an engine in its place, and call `check_end` when the engine is done.

    Any method raises `PolicyFault` when the policy breaks its contract in it; the text begins with the guarantee."""

    def __init__(self, policy: Scheduler) -> None:
        super().__init__(policy.options)
        self.policy = policy
        self.starvation_free = policy.starvation_free
        self.builder: CheckedStepBuilder | None = None
        self._known: dict[RequestState, _Known] = {}
        self._keys: dict[RequestState, Any] = {}
        self._builders: list[weakref.ref[CheckedStepBuilder]] = []
        self._finished: list[weakref.ref[ReadOnlyRequest]] = []

    # ── the contract ──────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, step: Any) -> None:
        self._check_keys()
        self.builder = CheckedStepBuilder(step, self)
        self._builders.append(weakref.ref(self.builder))
        try:
            returned = self._call("plan", self.builder)
        finally:
            self.builder = None
        if returned is not None:
            raise PolicyFault(f"composes the step: plan returned {returned!r}; it is a plain method that returns None")
        self._check_progress(step)

    def order_key(self, request: Any) -> Any:
        key = self._call("order_key", self.view(request))
        for other, known in self._keys.items():
            if other is not request:
                _check_comparable(key, known, request, other)
        self._keys[request] = key
        return key

    def on_arrival(self, request: Any, now: float) -> None:
        self._call("on_arrival", self.view(request), now)

    def on_update(self, progress: Progress, now: float) -> None:
        views = tuple([self.view(state) for state in progress.requests])  # type: ignore[arg-type]
        self._call("on_update", CheckedProgress(progress.duration, views, tuple(progress.num_new_tokens)), now)

    def on_finish(self, request: Any, now: float) -> None:
        self._call("on_finish", self.view(request), now)
        known = self._known.pop(request)
        self._keys.pop(request, None)
        if (request.params, request.labels) != (known.params, known.labels):
            raise PolicyFault(f"read-only requests: the policy changed the params or labels of '{request.id}'")
        self._finished.append(weakref.ref(known.view))

    def view(self, state: RequestState) -> ReadOnlyRequest:
        """What the policy sees of `state`: the same object as long as the request lives."""
        if state not in self._known:
            params, labels = copy.deepcopy(state.params), dict(state.labels)
            self._known[state] = _Known(ReadOnlyRequest(state), params, labels)
        return self._known[state].view

    # ── guarantees ────────────────────────────────────────────────────────────────────────────────────────────

    def check_end(self) -> None:
        """All requests are over: raise `PolicyFault` if the policy still holds what it was to let go."""
        if any(ref() for ref in self._builders) or any(ref() for ref in self._finished):
            gc.collect()  # what is held by nobody but itself
        if any(ref() for ref in self._builders):
            raise PolicyFault("keeps no builder: a builder is still referred to after plan has returned")
        kept = sum(ref() is not None for ref in self._finished)
        if len(self._finished) >= _MANY and kept > len(self._finished) // 2:
            raise PolicyFault(
                f"forgets finished requests: the policy still refers to {kept} of {len(self._finished)} requests that "
                "are over; drop them in on_finish"
            )

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.policy, method)(*arguments)
        except PolicyRunawayError as error:
            raise PolicyFault(f"calls: {error}; 16 per unfinished request are far more than a plan needs") from error
        except (Exception, SystemExit) as error:
            raise PolicyFault(f"raises nothing: {method} raised {type(error).__name__}: {error}") from error

    def _check_keys(self) -> None:
        if type(self.policy).order_key is Scheduler.order_key:
            return
        for state, key in self._keys.items():
            now = self._call("order_key", self.view(state))
            if now != key and repr(now) == repr(key):
                raise PolicyFault(f"a fixed order_key: {key!r} for '{state.id}' does not equal itself: is it a NaN?")
            if now != key:
                raise PolicyFault(f"a fixed order_key: it was {key!r} for '{state.id}' and is {now!r} now")

    def _check_progress(self, step: RealBuilder) -> None:
        """The core's own rule, see `interlace.scheduling.fallback`."""
        if step.rows or any(state.num_in_flight for state in self._known):
            return
        if step.wake_time is not None:
            if step.wake_time <= step.now:
                raise PolicyFault(
                    f"progress: plan left the step empty and asked to be woken at {step.wake_time}; it is {step.now}"
                )
            return
        complete(step)
        if step.rows or step.preempted:
            able = ", ".join(f"'{state.id}'" for state in step.rows) or "what it preempted"
            raise PolicyFault(
                f"progress: plan left the step empty and did not call wake_at, although {able} could run and no step "
                "is under way"
            )


def _check_comparable(key: Any, other_key: Any, request: RequestState, other: RequestState) -> None:
    try:
        consistent = (key < other_key) + (other_key < key) + (key == other_key) == 1
    except Exception as error:
        raise PolicyFault(
            f"a fixed order_key: {key!r} of '{request.id}' and {other_key!r} of '{other.id}' do not compare: {error}"
        ) from error
    if not consistent:
        raise PolicyFault(
            f"a fixed order_key: {key!r} of '{request.id}' and {other_key!r} of '{other.id}' are in no order"
        )
