"""`Ring`: bytes from one writer to many readers through shared memory, woken without polling.

The memory holds nothing but data. Positions are counters of the kernel (eventfd), two for each reader: bytes it may
read, bytes the writer may overwrite. Adding to one wakes whoever waits for it and orders memory between the two, so
there are no flags to look at and no lock that a dead process could hold. A message longer than the ring passes through
in pieces. The memory has no name (memfd): it is gone with the last process that has it open, however that one ends.
"""

from __future__ import annotations

import mmap
import os
import sys

import msgspec

_COUNT = 8
"""Bytes of an eventfd's value, and of the length before each message."""


class Seat(msgspec.Struct, frozen=True):
    """What one reader needs of a ring: file descriptors, which it inherits under the same numbers."""

    memory: int
    capacity: int
    filled: int
    """Counts the bytes that the reader may read."""
    freed: int
    """Counts the bytes that the writer may write again."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.memory, self.filled, self.freed)


class RingClosedError(Exception):
    """The ring was closed while, or before, something was written."""


class RingWriter:
    """The writing end, which owns everything. `write` comes from one thread, `close` from any."""

    def __init__(self, num_readers: int, capacity: int) -> None:
        """`capacity` in bytes. Messages up to half of it are seen by readers in one piece."""
        self._capacity = capacity
        self._position = 0
        self._room = [capacity] * num_readers
        self._closed = False
        memory = os.memfd_create("interlace-ring")
        os.ftruncate(memory, capacity)
        self._data = mmap.mmap(memory, capacity)
        self.seats = [Seat(memory, capacity, os.eventfd(0), os.eventfd(0)) for _ in range(num_readers)]

    def write(self, message: bytes) -> None:
        """Hand `message` to all readers; blocks while they have no room for it. Raises `RingClosedError`."""
        data = memoryview(len(message).to_bytes(_COUNT, sys.byteorder) + message)
        while data:
            size = min(len(data), max(1, self._capacity // 2))
            self._wait_for_room(size)
            _copy_in(self._data, self._position % self._capacity, data[:size])
            self._position += size
            for number, seat in enumerate(self.seats):
                self._room[number] -= size
                os.eventfd_write(seat.filled, size)
            data = data[size:]

    def close(self) -> None:
        """Let go of a writer that waits for readers which are gone; from now on nothing is written."""
        self._closed = True
        for seat in self.seats:
            os.eventfd_write(seat.freed, 1)

    def release(self) -> None:
        """Free memory and descriptors, when nobody writes any more."""
        self._data.close()
        for descriptor in {descriptor for seat in self.seats for descriptor in seat.descriptors}:
            os.close(descriptor)
        self.seats = []

    def _wait_for_room(self, size: int) -> None:
        for number, seat in enumerate(self.seats):
            while self._room[number] < size and not self._closed:
                self._room[number] += _take_count(seat.freed)
        if self._closed:
            raise RingClosedError("the ring was closed")


class RingReader:
    """One reading end; used from one thread of the process that inherited its seat."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._data = mmap.mmap(seat.memory, seat.capacity, prot=mmap.PROT_READ)
        self._position = 0
        self._available = 0
        self._taken = 0  # read since the writer was last told

    def read(self) -> bytearray:
        """The next message; blocks until it is there."""
        size = int.from_bytes(self._take(_COUNT), sys.byteorder)
        message = self._take(size)
        self._give_back()
        return message

    def _take(self, size: int) -> bytearray:
        taken = bytearray(size)
        done = 0
        while done < size:
            if not self._available:
                self._give_back()
                self._available = _take_count(self._seat.filled)
            piece = min(size - done, self._available)
            _copy_out(self._data, self._position % self._seat.capacity, memoryview(taken)[done : done + piece])
            done += piece
            self._position += piece
            self._available -= piece
            self._taken += piece
        return taken

    def _give_back(self) -> None:
        if self._taken:
            os.eventfd_write(self._seat.freed, self._taken)
            self._taken = 0


def _take_count(descriptor: int) -> int:
    """The value of an eventfd, which is then zero; blocks while it is."""
    return int.from_bytes(os.read(descriptor, _COUNT), sys.byteorder)  # unlike eventfd_read, goes on after a signal


def _copy_in(ring: mmap.mmap, at: int, data: memoryview) -> None:
    first = min(len(data), len(ring) - at)
    ring[at : at + first] = data[:first]
    ring[: len(data) - first] = data[first:]


def _copy_out(ring: mmap.mmap, at: int, into: memoryview) -> None:
    first = min(len(into), len(ring) - at)
    into[:first] = ring[at : at + first]
    into[first:] = ring[: len(into) - first]
