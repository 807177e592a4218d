"""`RankRunner`: one rank, driven by messages. It runs in the rank's own process and knows nothing of transports."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from interlace.clock import MonotonicClock
from interlace.interfaces.executor import ExecutorEvent
from interlace.plugins.executors.ranks import wire
from interlace.plugins.executors.ranks.meeting import lost_a_peer
from interlace.remote_error import RemoteError

if TYPE_CHECKING:
    from interlace.interfaces.model import Parallel
    from interlace.plugins.executors.ranks.meeting import Rendezvous
    from interlace.spec import ResolvedSpec
    from interlace.worker.place import Place
    from interlace.worker.worker import Worker


class RankRunner:
    """Carries out what the executor says, one message after the other, from one thread."""

    def __init__(
        self, spec: ResolvedSpec, place: Place, meeting: Rendezvous, on_event: Callable[[ExecutorEvent], None]
    ) -> None:
        """`meeting` is where it finds the other ranks, with the first message. `on_event` hears of the progress of
        loading; executors hand on that of rank 0."""
        self.place = place
        self.started = False
        """Whether steps may come."""
        self.stopped = False
        """Whether `wire.Stop` was the last message."""
        self._spec = spec
        self._meeting = meeting
        self._on_event = on_event
        self._clock = MonotonicClock()
        self._parallel: Parallel | None = None
        self._worker: Worker | None = None
        self._broken: RemoteError | None = None
        self._num_steps = 0

    def handle(self, message: bytes | bytearray) -> bytes | None:
        """Carry out one encoded `wire.ToRank`; returns the encoded answer, None where there is none.

        Raises what a start fails with. A failing step or operation is an answer."""
        answer: wire.FromRank | None
        match wire.decode_to_rank(message):
            case wire.Step() as step:
                answer = self._step(step)
            case wire.Control(operation=operation, arguments=arguments):
                answer = self._control(operation, arguments)
            case wire.Prepare():
                answer = wire.Prepared(self._prepare())
            case wire.Start(num_blocks=num_blocks):
                assert self._worker is not None, "Prepare comes first"
                answer = wire.Started(self._worker.start(num_blocks=num_blocks))
                self.started = True
            case wire.Stop():
                self.shutdown()
                self.stopped, answer = True, None
        return None if answer is None else wire.encode(answer)

    def shutdown(self) -> None:
        """Drop model, cache and connections. May be called twice."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self._parallel = None

    def _prepare(self) -> int:
        began = self._clock.now()
        from interlace.plugins.executors.ranks.collectives import connect
        from interlace.worker.worker import Worker

        spec, place = self._spec, self.place
        device = place.device or spec.device
        self._parallel = connect(place, device, self._meeting, deterministic=spec.deterministic)
        self._worker = Worker(spec, self._on_event, self._clock, place, self._parallel)
        return self._worker.prepare(began)

    def _step(self, step: wire.Step) -> wire.Stepped | wire.StepFailed | None:
        """Where there are several ranks, a step that fails on one leaves the others in the middle of an exchange: this
        rank takes no further one."""
        step_id = step.plan.step_id
        if self._broken is not None:
            return wire.StepFailed(step_id, self._broken)
        try:
            if self._worker is None:
                raise RuntimeError("the rank was not started, or was shut down")
            result = self._worker.execute(step.plan, step.sampled)
        except Exception as error:
            told = RemoteError.of(error)
            if self.place.world > 1:
                self._broken = told
            return wire.StepFailed(step_id, told, lost_a_peer(error))
        self._num_steps += 1
        return wire.Stepped(result) if self.place.samples else None

    def _control(self, operation: str, arguments: dict[str, Any]) -> wire.Controlled:
        try:
            return wire.Controlled(self._perform(operation, arguments))
        except Exception as error:
            return wire.Controlled(None, RemoteError.of(error))

    def _perform(self, operation: str, arguments: dict[str, Any]) -> Any:
        match operation:
            case "ranks":
                return self._describe(**arguments)
            case _:
                raise ValueError(f"executor {self._spec.executor.name} offers no operation '{operation}'")

    def _describe(self) -> dict[str, Any]:
        """Operation `ranks`: what this rank is and has done. `resident_bytes` are the most it ever had."""
        place = self.place
        traffic = getattr(self._parallel, "traffic", None)
        return {
            "rank": place.rank,
            "stage": place.stage,
            "tensor_rank": place.tensor_rank,
            "device": place.device or self._spec.device,
            "pid": os.getpid(),
            "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "processor_seconds": sum(os.times()[:2]),
            "steps": self._num_steps,
            "exchanges": dict(traffic.calls) if traffic else {},
            "exchanged_bytes": dict(traffic.nbytes) if traffic else {},
        }
