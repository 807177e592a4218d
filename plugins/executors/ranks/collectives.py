"""`TorchParallel`: what ranks exchange while they compute, over torch.distributed (gloo on CPU, nccl on GPUs), and on
CPU over shared memory where they have a board.

Process groups are made directly from a store and not registered in `torch.distributed`, where there is one set per
process: two engines can live in one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed

from interlace.interfaces.model import Parallel
from interlace.plugins.executors.ranks.board import Board
from interlace.plugins.executors.ranks.meeting import PeerLostError, Rendezvous

if TYPE_CHECKING:
    from interlace.worker.place import Place

dist: Any = torch.distributed  # its type stubs leave out stores and groups


class Traffic(msgspec.Struct):
    """What a rank has handed to others while computing, by kind of exchange."""

    calls: dict[str, int] = {}
    nbytes: dict[str, int] = {}
    """Bytes of this rank's tensors; what an algorithm makes of them on the wire is its own."""

    def count(self, kind: str, nbytes: int) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes


def connect(place: Place, device: str, meeting: Rendezvous, *, deterministic: bool = False) -> Parallel:
    """Join the other ranks; blocks until all are there. `device`: where this rank's tensors are."""
    if place.world == 1:
        return Parallel()
    timeout = timedelta(seconds=meeting.timeout_s)
    with _exchange("connecting"):
        store = _open_store(meeting, place.world, timeout)
        return TorchParallel(place, device, store, meeting, timeout, deterministic=deterministic)


class TorchParallel(Parallel):
    """One group per stage for collectives, and one of all ranks to pass activations from stage to stage."""

    def __init__(
        self,
        place: Place,
        device: str,
        store: Any,
        meeting: Rendezvous,
        timeout: timedelta,
        *,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: sum in the order of ranks, whatever the size of what is summed."""
        self.rank, self.size = place.tensor_rank, place.tensor_size
        self.stage, self.num_stages, self.stage_layers = place.stage, place.num_stages, place.stage_layers
        self.traffic = Traffic()
        self._device = torch.device(device)
        self._in_rank_order = deterministic and self.size > 2  # of two, the order makes no difference
        self._board = Board(meeting.board) if meeting.board is not None else None
        self._sends: deque[tuple[Any, torch.Tensor]] = deque()
        self._peers: Any = None
        self._stages: Any = None
        if self.size > 1:
            prefixed = dist.PrefixStore(f"stage{place.stage}", store)
            self._peers = _make_group(prefixed, self._device, self.rank, self.size, meeting, timeout)
        if self.num_stages > 1:
            prefixed = dist.PrefixStore(f"pipeline{place.tensor_rank}", store)
            self._stages = _make_group(prefixed, self._device, self.stage, self.num_stages, meeting, timeout)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x
        x = x.contiguous()
        self.traffic.count("all_reduce", x.nbytes)
        if self._board is not None:
            return self._board.all_reduce(x)
        if self._in_rank_order:
            parts = self._gather(x)
            total = parts[0]
            for part in parts[1:]:
                total += part
            return total
        with _exchange("all_reduce"):
            self._peers.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int] | None = None) -> torch.Tensor:
        if self.size == 1:
            return x
        x = x.contiguous()
        self.traffic.count("all_gather", x.nbytes)
        widths = widths or [x.shape[-1]] * self.size
        if self._board is not None and (gathered := self._board.all_gather(x, widths)) is not None:
            return gathered
        longest = max(widths)  # gloo and nccl gather equal parts only
        padded = x if x.shape[-1] == longest else torch.nn.functional.pad(x, (0, longest - x.shape[-1]))
        parts = self._gather(padded)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def send(self, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        if self.is_last_stage:
            super().send(hidden, residual)
        both = torch.stack((hidden, residual))  # [2, tokens, hidden]
        self.traffic.count("send", both.nbytes)
        with _exchange("send"):
            while len(self._sends) >= self.num_stages:  # as many steps are under way: the oldest was taken long ago
                self._sends.popleft()[0].wait()
            self._sends.append((self._stages.send([both], self.stage + 1, 0), both))

    def receive(self, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_first_stage:
            super().receive(num_tokens, hidden_size, dtype)
        both = torch.empty((2, num_tokens, hidden_size), dtype=dtype, device=self._device)
        with _exchange("receive"):
            self._stages.recv([both], self.stage - 1, 0).wait()
        return both[0], both[1]

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _exchange("all_gather"):
            self._peers.allgather([parts], [x]).wait()
        return parts


@contextmanager
def _exchange(kind: str) -> Iterator[None]:
    """Whatever goes wrong between ranks is a `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"{kind} with the other ranks failed: {error}") from error


def _open_store(meeting: Rendezvous, world: int, timeout: timedelta) -> Any:
    if meeting.file:
        store: Any = dist.FileStore(meeting.file, world)
    else:
        host, _, port = meeting.address.rpartition(":")
        store = dist.TCPStore(host, int(port), world, False, timeout, wait_for_workers=False)
    store.set_timeout(timeout)
    return store


def _make_group(store: Any, device: torch.device, rank: int, size: int, meeting: Rendezvous, timeout: timedelta) -> Any:
    """A process group. The timeout is that of single operations, too: supervision notices a hang long before."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    interface = {"interface": meeting.interface} if meeting.interface else {}
    where = {"hostname": meeting.host} if meeting.host else interface
    options._devices = [dist.ProcessGroupGloo.create_device(**where)]
    return dist.ProcessGroupGloo(store, rank, size, options)
