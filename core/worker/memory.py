"""How much memory there is."""

from __future__ import annotations

from pathlib import Path

from interlace.worker.control_group import memory_room


def free_memory(device: str) -> int:
    """Bytes that can still be taken on `device`: the GPU's free memory, or what the operating system calls
    available, within the control groups' limits."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    room = memory_room()
    return _available() if room is None else min(_available(), room)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def format_bytes(count: float) -> str:
    """A size for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
