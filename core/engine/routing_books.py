"""What the front knows of its replicas and of the requests they have; routers see it as `ReplicaView` and
`RoutedRequest`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from interlace.engine.client import EngineClient
from interlace.errors import EngineDeadError, EngineRestartingError
from interlace.interfaces.executor import ExecutorInfo
from interlace.kv.prefix_cache import chain_root, extend_chain
from interlace.messages import EngineRequest, SamplingParams, StepOutput


class Routed:
    """One request with all its samples: a `RoutedRequest`."""

    __slots__ = ("_block_size", "_hashes", "id", "num_unfinished", "samples")

    def __init__(self, samples: list[EngineRequest], block_size: int) -> None:
        """`block_size` 0: there is no prefix cache."""
        self.samples = samples
        self.id = samples[0].group or samples[0].id
        self.num_unfinished = len(samples)
        self._block_size = block_size
        self._hashes: list[bytes] | None = None

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self.samples[0].prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        return self.samples[0].params

    @property
    def priority(self) -> int:
        return self.samples[0].priority

    @property
    def labels(self) -> Mapping[str, str]:
        return self.samples[0].labels

    @property
    def arrival_time(self) -> float:
        return self.samples[0].arrival_time

    @property
    def block_hashes(self) -> Sequence[bytes]:
        if self._hashes is None:
            self._hashes = []
            if self._block_size:
                first = self.samples[0]
                root, tokens = chain_root(first.cache_salt, first.adapter), first.prompt_token_ids
                extend_chain(self._hashes, root, tokens, self._block_size, len(tokens))
        return self._hashes


def group_samples(requests: Iterable[EngineRequest], block_size: int) -> list[Routed]:
    """The samples of each request together, in order of arrival."""
    groups: dict[str, list[EngineRequest]] = {}
    for request in requests:
        groups.setdefault(request.group or request.id, []).append(request)
    return [Routed(samples, block_size) for samples in groups.values()]


class Replica:
    """One engine, its client, and the requests it has: a `ReplicaView`."""

    def __init__(self, index: int, client: EngineClient) -> None:
        self.index = index
        self.client = client
        self.info: ExecutorInfo | None = None
        """None before the start."""
        self.refusal: EngineDeadError | None = EngineDeadError("the engine was not started")
        """Why it takes no requests; None: it does."""
        self.waiting: dict[str, Routed] = {}
        """Engine request id → the request it is a sample of: sent, no step has computed anything of it yet."""
        self.running: dict[str, Routed] = {}
        self.kv_usage = 0.0
        self.last_sent = 0

    @property
    def is_gone(self) -> bool:
        """Whether it was started and will never take requests again."""
        refusal = self.refusal
        return self.info is not None and refusal is not None and not isinstance(refusal, EngineRestartingError)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_blocks(self) -> int:
        return 0 if self.info is None else self.info.kv.num_blocks - 1

    def enter(self, routed: Routed) -> None:
        """It is about to be given a request."""
        for sample in routed.samples:
            self.waiting[sample.id] = routed

    def withdraw(self, routed: Routed) -> None:
        """It did not get the request after all."""
        for sample in routed.samples:
            self.waiting.pop(sample.id, None)

    def has(self, request_id: str) -> bool:
        """Whether a sample of that id is here."""
        return request_id in self.running or request_id in self.waiting

    def note(self, output: StepOutput) -> list[Routed]:
        """Take in what its engine says; returns the requests of which the last sample has ended."""
        for request_id in output.first_scheduled:
            if (routed := self.waiting.pop(request_id, None)) is not None:
                self.running[request_id] = routed
        ended = []
        for request_id in output.finished:
            found = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
            if found is not None:
                found.num_unfinished -= 1
                if not found.num_unfinished:
                    ended.append(found)
        if output.stats is not None:
            self.kv_usage = output.stats.kv_usage
        return ended

    def lose(self, refusal: EngineDeadError) -> tuple[list[str], list[Routed]]:
        """Its engine is gone: the engine request ids it had, and the requests they are samples of."""
        self.refusal = refusal
        requests = list(dict.fromkeys([*self.waiting.values(), *self.running.values()]))
        ids = [*self.waiting, *self.running]
        self.waiting, self.running, self.kv_usage = {}, {}, 0.0
        return ids, requests
