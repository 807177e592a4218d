"""What a step sends to the device: columns of numbers, packed into one buffer and sent with one copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from interlace.worker.streams import Stream

Columns = Mapping[str, npt.NDArray[Any]]

_ALIGNMENT = 16
_TORCH_TYPES: Mapping[str, torch.dtype] = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


class _Place(NamedTuple):
    offset: int
    num_bytes: int
    dtype: str


class Layout:
    """Where each column lies in the buffer. Equal columns give equal places, so a device graph finds its own again."""

    def __init__(self, columns: Iterable[tuple[str, str, int]]) -> None:
        """`columns`: name, type (int64, int32 or float32), number of values."""
        self._places: dict[str, _Place] = {}
        offset = 0
        for name, dtype, count in columns:
            num_bytes = count * np.dtype(dtype).itemsize
            self._places[name] = _Place(offset, num_bytes, dtype)
            offset += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = offset

    def on_host(self, buffer: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """The columns as views of `buffer` on the host."""
        return {
            name: buffer[place.offset : place.offset + place.num_bytes].view(place.dtype)
            for name, place in self._places.items()
        }

    def on_device(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns as views of `buffer` on the device."""
        return {
            name: buffer[place.offset : place.offset + place.num_bytes].view(_TORCH_TYPES[place.dtype])
            for name, place in self._places.items()
        }


class Package(NamedTuple):
    """Columns on their way to the device: `send` is to run there, and then `columns` are what was packed."""

    source: torch.Tensor
    target: torch.Tensor
    layout: Layout

    def send(self) -> None:
        self.target.copy_(self.source, non_blocking=True)

    def columns(self) -> dict[str, torch.Tensor]:
        return self.layout.on_device(self.target)


class Upload:
    """A buffer on the device, and as many pinned ones on the host as steps may be under way, and one more: what a step
    that still runs reads is not overwritten."""

    def __init__(self, stream: Stream, num_bytes: int, depth: int, *, grows: bool = False) -> None:
        """`grows`: more than `num_bytes` may be packed, in buffers that are then made anew; so no device graph may
        hold the old ones."""
        self._stream = stream
        self._depth = depth
        self._grows = grows
        self._next = 0
        self._make(num_bytes)

    def _make(self, num_bytes: int) -> None:
        self._hosts = [self._stream.pinned(num_bytes) for _ in range(self._depth)]
        self.buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._stream.device)

    def pack(self, layout: Layout, columns: Columns, padding: Mapping[str, int] | None = None) -> Package:
        """Write `columns` into the next host buffer, for `layout`. Where a column is shorter than its place, or
        missing, its `padding` follows (0 if it has none there)."""
        if self._grows and layout.num_bytes > len(self.buffer):
            self._make(2 * layout.num_bytes)
        host = self._hosts[self._next]
        self._next = (self._next + 1) % self._depth
        for name, place in layout.on_host(host.numpy()).items():
            values = columns.get(name, ())
            place[: len(values)] = values
            if len(values) < len(place):
                place[len(values) :] = 0 if padding is None else padding.get(name, 0)
        used = slice(layout.num_bytes)
        return Package(host[used], self.buffer[used], layout)
