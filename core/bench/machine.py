"""Where a benchmark ran: processor, load, versions, memory. Read from the operating system; unknown things are None."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

import msgspec

from interlace import __version__

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine and what is installed on it."""

    cpu: str | None
    cores: int
    """CPU cores this process may use."""
    load: float | None
    """Processes that wanted a core, on average over the minute before the benchmark: its own share not included."""
    system: str
    versions: dict[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether others leave too little of the machine for figures to mean much."""
        return self.load is not None and self.load > 0.5 * self.cores


def inspect_machine() -> Machine:
    """Look at the machine now, before the benchmark adds to the load."""
    versions = {"interlace": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
    )


def _cpu_name() -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def process_age() -> float | None:
    """Seconds since this process was started, interpreter included; None where the system does not tell (not Linux)."""
    try:
        uptime = float(_read("/proc/uptime").split()[0])
        # Field 22 of stat; the command's name before it, in brackets, may contain anything.
        started = float(_read("/proc/self/stat").rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (IndexError, ValueError, OSError):
        return None
    return max(0.0, uptime - started)


def peak_memory() -> int:
    """Largest resident size so far, in bytes, of this process and of its children that are alive, each at its own
    peak; without /proc, of this process only."""
    peaks = [peak for pid in (os.getpid(), *_descendants(os.getpid())) if (peak := _peak_of(pid)) is not None]
    if peaks:
        return sum(peaks)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _peak_of(pid: int) -> int | None:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        fields = _read(str(entry)).rpartition(")")[2].split()
        if len(fields) > 1:
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    todo = [root]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


def _read(path: str) -> str:
    """A file of /proc, or nothing: it may not exist, and processes come and go."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
