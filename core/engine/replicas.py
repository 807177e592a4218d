"""`Replicas`: several equal engines behind one front. A router chooses for each request; deaths stay where they are.

Each replica has a client of its own, supervised as a rule: a replica that dies takes only its own requests with it,
the others go on, and it takes requests again when its client has started it anew. Requests never move.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from interlace.clock import Clock
from interlace.engine.client import EngineClient, EngineHealth, OnDeath, OnEvent, OnOutput
from interlace.engine.guarded_router import GuardedRouter
from interlace.engine.output_processor import dead_again
from interlace.engine.routing_books import Replica, Routed, group_samples
from interlace.errors import EngineDeadError, EngineRestartingError, EngineSilentError
from interlace.interfaces.executor import ExecutorEvent, ExecutorInfo
from interlace.messages import EngineRequest, StepOutput

logger = logging.getLogger("interlace.engine")

WORKING = ("ok", "degraded")


class Replicas(EngineClient):
    """An engine client made of several; thread-safe as any client.

    `on_output`, `on_death`, `on_loss` and `on_restart` are called by one thread at a time, though not always the same
    one, and the outputs of one replica in their order. `on_death` means that none is left that will come back.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        router: GuardedRouter,
        block_size: int,
        layout: str = "",
        clock: Clock | None = None,
    ) -> None:
        """`clients` are not started. `block_size` is that of the prefix cache, 0 where there is none. `layout` says in
        the report of the start how the machine is shared. The router is watched if there is a `clock`."""
        self._replicas = [Replica(index, client) for index, client in enumerate(clients)]
        self._router = router
        self._block_size = block_size
        self._layout = layout
        self._num_routed = 0
        self._last_cause: str | None = None
        self._closing = False
        self._clock = clock
        self._watch = ExitStack()
        self._lock = threading.Lock()  # of the books and the router; never held while the front is called
        self._delivery = threading.Lock()  # held while the front is called; `_lock` may be taken within
        for replica in self._replicas:
            replica.client.on_restart = partial(self._restarted, replica)

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, on_output: OnOutput, on_death: OnDeath, on_event: OnEvent | None = None) -> ExecutorInfo:
        """Start all of them side by side; if one cannot start, none is left behind."""
        self._on_output, self._on_death, self._on_event = on_output, on_death, on_event
        if self._clock is not None:
            self._watch.enter_context(self._router.watch(self._clock))
        with self._pool() as pool:
            starts = [pool.submit(self._start_one, replica) for replica in self._replicas]
            try:
                done, _ = wait(starts, return_when=FIRST_EXCEPTION)
                for start in done:
                    start.result()
            except BaseException:
                self.shutdown()
                raise
        return self._joint_info()

    def _start_one(self, replica: Replica) -> None:
        info = replica.client.start(
            partial(self._take_output, replica), partial(self._died, replica), partial(self._take_event, replica)
        )
        with self._lock:
            if replica.info is None:  # otherwise it has died since, and may even be back
                replica.info = info
                replica.refusal = replica.refusal if self._closing else None

    def shutdown(self) -> None:
        gone = EngineDeadError("the engine was shut down")
        self._watch.close()
        with self._lock:
            self._closing = True
            for replica in self._replicas:
                replica.refusal = gone
        try:
            with self._pool() as pool:
                for ending in [pool.submit(replica.client.shutdown) for replica in self._replicas]:
                    ending.result()
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            for replica in self._replicas:
                replica.client.shutdown()

    def _pool(self) -> ThreadPoolExecutor:
        """Threads for as long as a question to all replicas takes."""
        return ThreadPoolExecutor(len(self._replicas), thread_name_prefix="interlace-replicas")

    @property
    def infos(self) -> tuple[ExecutorInfo, ...]:
        return tuple(replica.info for replica in self._replicas if replica.info is not None)

    def _joint_info(self) -> ExecutorInfo:
        """The first replica's, with the choices of all and the times of the slowest."""
        infos = self.infos
        slowest = max(infos, key=lambda info: sum(info.timings.values()))
        selections = tuple(dict.fromkeys(choice for info in infos for choice in info.selections))
        return msgspec.structs.replace(infos[0], selections=selections, timings=slowest.timings)

    def describe(self) -> list[tuple[str, str]]:
        return [("replicas", f"{len(self._replicas)} engines{self._layout and f', {self._layout}'}")]

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, requests: list[EngineRequest]) -> None:
        """Route and queue; either all requests are queued or none. Samples of one prompt stay together. Raises
        `EngineRestartingError`, or another `EngineDeadError`, if no replica takes requests."""
        with self._lock:
            sent: dict[Routed, Replica] = {}
            try:
                self._send(group_samples(requests, self._block_size), sent)
            except BaseException:
                for routed, replica in sent.items():
                    self._recall(replica, routed)
                raise

    def _send(self, pending: list[Routed], sent: dict[Routed, Replica]) -> None:
        """Hand every request to a replica; one that turns out to be gone is left out in the next round."""
        refused: set[int] = set()
        while pending:
            able = [replica for replica in self._replicas if replica.refusal is None and replica.index not in refused]
            if not able:
                raise dead_again(self._refusal())
            batches: dict[Replica, list[Routed]] = {}
            for routed in pending:
                replica = self._route(routed, able)
                batches.setdefault(replica, []).append(routed)
                sent[routed] = replica
            pending = []
            for replica, batch in batches.items():
                try:
                    replica.client.add([sample for routed in batch for sample in routed.samples])
                except EngineDeadError:  # it has died, and the thread that tells so is on its way
                    refused.add(replica.index)
                    pending += batch
                    for routed in batch:
                        del sent[routed]
                        self._withdraw(replica, routed)

    def _route(self, routed: Routed, able: Sequence[Replica]) -> Replica:
        index = self._router.route(routed, able)
        replica = self._replicas[index]
        self._num_routed += 1
        replica.last_sent = self._num_routed
        replica.enter(routed)
        self._router.tell("on_routed", routed, replica)
        return replica

    def _withdraw(self, replica: Replica, routed: Routed) -> None:
        replica.withdraw(routed)
        self._router.tell("on_finished", routed, replica)

    def _recall(self, replica: Replica, routed: Routed) -> None:
        """Take back what was sent; the engine may hear of it twice, which does no harm."""
        self._withdraw(replica, routed)
        self._abort_at(replica, [sample.id for sample in routed.samples])

    def _refusal(self) -> EngineDeadError:
        """Why no replica takes requests: the one that is back first, if any will be, speaks for all."""
        refusals = [replica.refusal for replica in self._replicas if replica.refusal is not None]
        restarting = [refusal for refusal in refusals if isinstance(refusal, EngineRestartingError)]
        if restarting:
            return min(restarting, key=lambda refusal: refusal.retry_after)
        if len(refusals) < len(self._replicas):  # one has died this very moment
            return EngineRestartingError("the engines that take requests have died this moment")
        return refusals[-1]

    def abort(self, request_ids: list[str]) -> None:
        """As every client's; ids that no replica has are ignored. Never raises: a dead engine's requests have ended."""
        with self._lock:
            for replica in self._replicas:
                ids = [request_id for request_id in request_ids if replica.has(request_id)]
                if ids:
                    self._abort_at(replica, ids)

    def _abort_at(self, replica: Replica, ids: list[str]) -> None:
        try:
            replica.client.abort(ids)
        except EngineDeadError:
            logger.debug("nothing to abort: replica %d is gone", replica.index)

    # ── questions to all ──────────────────────────────────────────────────────────────────────────────────────

    def health(self, timeout: float = 5.0) -> EngineHealth:
        """Of all replicas, which are asked side by side. `degraded` while some of them work, but not all as they
        should; never raises."""
        with self._pool() as pool:
            parts = tuple(pool.map(lambda replica: _ask(replica, timeout), self._replicas))
        complaint, last_cause = self._router.degraded, self._last_cause  # without the lock: a stuck router has it
        working = [part for part in parts if part.status in WORKING]
        reasons = [f"replica {index}: {part.reason}" for index, part in enumerate(parts) if part.status != "ok"]
        reasons += [complaint] if complaint else []
        if not working:
            status = "restarting" if any(part.status == "restarting" for part in parts) else "dead"
        else:
            status = "degraded" if reasons else "ok"
        return EngineHealth(
            status=status,
            reason="; ".join(reasons) or None,
            restarts=sum(part.restarts for part in parts),
            last_cause=last_cause,
            num_running=sum(part.num_running for part in parts),
            num_waiting=sum(part.num_waiting for part in parts),
            steps=sum(part.steps for part in parts),
            replicas=parts,
        )

    def control(self, operation: str, **arguments: Any) -> list[Any]:
        """Run a named operation in every replica that works, side by side: a list of their answers by index, None for
        one that is dead. Raises what one of them raised, and `EngineDeadError` if all are dead."""
        with self._pool() as pool:
            calls = [pool.submit(replica.client.control, operation, **arguments) for replica in self._replicas]
        answers: list[Any] = []
        deaths: list[EngineDeadError] = []
        for call in calls:
            try:
                answers.append(call.result())
            except EngineDeadError as error:
                deaths.append(error)
                answers.append(None)
        if len(deaths) == len(answers):
            raise deaths[0]
        if operation == "reset_prefix_cache":
            with self._lock:
                self._router.tell("on_caches_reset")
        return answers

    # ── from the clients' threads ─────────────────────────────────────────────────────────────────────────────

    def _take_output(self, replica: Replica, output: StepOutput) -> None:
        with self._lock:
            for routed in replica.note(output):
                self._router.tell("on_finished", routed, replica)
            seconds = self._router.take_seconds() if output.stats is not None else 0.0
        with self._delivery:
            self._on_output(_stamp(output, replica.index, self._router.account, seconds))

    def _take_event(self, replica: Replica, event: ExecutorEvent) -> None:
        """Progress of the first replica stands for all; the others load the same at the same time."""
        if self._on_event is None or (event.kind == "progress" and replica.index):
            return
        if event.kind != "progress":
            event = msgspec.structs.replace(event, message=f"replica {replica.index}: {event.message}")
        self._on_event(event)

    def _died(self, replica: Replica, error: EngineDeadError) -> None:
        with self._lock:
            if self._closing:
                return
            ids, requests = replica.lose(error)
            for routed in requests:
                self._router.tell("on_finished", routed, replica)
            self._router.tell("on_replica_lost", replica)
            self._last_cause = f"replica {replica.index}: {error}"
            refusals = [other.refusal for other in self._replicas]
            over = all(other.is_gone for other in self._replicas)
        wait_s = 1.0 if None in refusals or not isinstance(error, EngineRestartingError) else error.retry_after
        with self._delivery:
            if over:
                self._on_death(error)
            elif self.on_loss is not None:
                told = EngineRestartingError(f"replica {replica.index} of {len(self._replicas)}: {error}", wait_s)
                told.__cause__ = error.__cause__
                self.on_loss(told, ids, replica.index)

    def _restarted(self, replica: Replica, info: ExecutorInfo) -> None:
        with self._lock:
            replica.info = info
            replica.refusal = replica.refusal if self._closing else None
            self._router.tell("on_replica_back", replica)
        logger.info("replica %d takes requests again", replica.index)
        with self._delivery:
            if self.on_restart is not None:
                self.on_restart(self._joint_info())


def _ask(replica: Replica, timeout: float) -> EngineHealth:
    try:
        return replica.client.health(timeout)
    except EngineSilentError as error:
        return EngineHealth(status="degraded", reason=str(error))
    except EngineDeadError as error:
        return EngineHealth(status="dead", reason=str(error))


def _stamp(output: StepOutput, index: int, account: str, seconds: float) -> StepOutput:
    """The same output saying whose it is, and what the router took since the last one."""
    stats = output.stats
    if stats is not None and (index or seconds):
        plugin_seconds = {**stats.plugin_seconds, account: seconds} if seconds else stats.plugin_seconds
        stats = msgspec.structs.replace(stats, engine=index, plugin_seconds=plugin_seconds)
    if stats is output.stats and not index:
        return output
    return msgspec.structs.replace(output, engine=index, stats=stats)
