"""What the control groups of this process (those of its container) leave it: processors and memory.

Both versions are read: in version 2 one tree holds everything (`cpu.max`, `memory.max`), in version 1 each controller
has its own (`cpu.cfs_quota_us`, `memory.limit_in_bytes`). A limit of an outer group binds the inner ones, so all
groups up to the root count. See the kernel's documentation, admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Processors' worth of time this process may use, such as 1.5; None: no limit is known."""
    found: list[float] = []
    for folder in _folders("", root, membership):
        limit = _words(folder / "cpu.max")
        if len(limit) == 2 and limit[0] != "max":
            found.append(int(limit[0]) / int(limit[1]))
    for folder in _folders("cpu", root, membership):
        quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
        if quota and period and int(quota[0]) > 0:
            found.append(int(quota[0]) / int(period[0]))
    return min(found, default=None)


def memory_room(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that may still be taken before a limit is reached; None: no limit is known."""
    rooms: list[int] = []
    for controller, limit_name, usage_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in _folders(controller, root, membership):
            limit, usage = _words(folder / limit_name), _words(folder / usage_name)
            if limit and usage and limit[0] != "max":
                rooms.append(max(0, int(limit[0]) - int(usage[0])))
    return min(rooms, default=None)


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """This process's group of a controller of version 1 (or, "", of version 2) and those around it, innermost first.

    A container may see its own group as the root, whatever `membership` says; so groups that are not there are passed
    over."""
    try:
        lines = membership.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            top = root / names if controller else root
            inner = top / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top) and folder.is_dir())


def _words(file: Path) -> list[str]:
    """The words of a control file; none if it is missing, or no number or `max`."""
    try:
        words = file.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
    return words if all(word == "max" or word.lstrip("-").isdecimal() for word in words) else []
