"""`Footprint`: what a process holds of the system, to see what is left of something that was shut down."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from interlace.clock import MonotonicClock

_PROC = Path("/proc")
_POLL_S = 0.02


class Footprint(NamedTuple):
    """Threads everywhere; the rest where there is /proc."""

    threads: frozenset[threading.Thread]
    processes: frozenset[tuple[int, str]]
    """(pid, start time) of all descendants, those included that have ended and were not waited for."""
    files: frozenset[tuple[str, str]]
    """(number, what it refers to) of the open file descriptors of this process, sockets and pipes included."""
    shared_memory: frozenset[str]
    """Files of /dev/shm that this process or a descendant has mapped or opened."""

    @classmethod
    def take(cls) -> Footprint:
        """As it is now."""
        processes = frozenset(_descendants(os.getpid()))
        everybody = [os.getpid(), *(pid for pid, _ in processes)]
        return cls(
            frozenset(threading.enumerate()),
            processes,
            frozenset(_open_files(os.getpid())),
            frozenset(path for pid in everybody for path in _shared_memory(pid)),
        )

    def left_of(self, during: Footprint, wait_s: float) -> list[str]:
        """What was not there before (`self`) and is there now, or was there in between (`during`) and has become an
        orphan. Waits up to `wait_s` seconds for it to go."""
        clock = MonotonicClock()
        deadline = clock.now() + wait_s
        while left := list(self._left_of(during)):
            if clock.now() > deadline:
                return left
            threading.Event().wait(_POLL_S)
        return []

    def _left_of(self, during: Footprint) -> Iterator[str]:
        now = Footprint.take()
        for thread in now.threads - self.threads:
            yield f"thread '{thread.name}'"
        for pid, start in (during.processes | now.processes) - self.processes:
            if (status := _status(pid)) is not None and status[2] == start:
                ended = ", which has ended and was never waited for" if status[0] == "Z" else ""
                yield f"process {pid} ({_command(pid)}){ended}"
        for number, target in now.files - self.files:
            yield f"file descriptor {number} ({target})"
        for path in (during.shared_memory | now.shared_memory) - self.shared_memory:
            if os.path.exists(path):
                yield f"shared memory {path}"


def _status(pid: int) -> tuple[str, int, str] | None:
    """(state, parent, start time) of a process, None if it is gone."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), fields[19]


def _descendants(root: int) -> Iterator[tuple[int, str]]:
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in _PROC.glob("[0-9]*"):
        if (status := _status(int(entry.name))) is not None:
            children.setdefault(status[1], []).append((int(entry.name), status[2]))
    todo = list(children.get(root, ()))
    while todo:
        child = todo.pop()
        yield child
        todo += children.get(child[0], ())


def _command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return "gone"


def _open_files(pid: int) -> Iterator[tuple[str, str]]:
    """(number, what it refers to) of each descriptor."""
    folder = _PROC / str(pid) / "fd"
    for name in _listed(folder):
        try:
            target = os.readlink(folder / name)
        except OSError:  # the descriptor that listed the folder
            continue
        yield name, target


def _shared_memory(pid: int) -> Iterator[str]:
    try:
        maps = (_PROC / str(pid) / "maps").read_text()
    except OSError:
        maps = ""
    mapped: Iterable[str] = re.findall(r"(/dev/shm/.*)$", maps, re.MULTILINE)
    for path in (*mapped, *(target for _, target in _open_files(pid))):
        if path.startswith("/dev/shm/"):
            yield path


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
