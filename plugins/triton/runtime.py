"""Whether and where Triton can run. Imports triton only once it is known to be there."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs the kernels are written for (asynchronous copies, bfloat16)."""

_FP8_CAPABILITY = (8, 9)
"""The same for GPUs that convert to and from e4m3."""

MAX_SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that one program may use on a Hopper GPU."""

INTERPRETED_MULTIPROCESSORS = 1
"""What the interpreter, which runs one program after the other, counts as."""


def is_interpreted() -> bool:
    """Whether Triton's interpreter is on in this process, so that kernels run on the CPU. Imports triton."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def refusal(device: str) -> str | None:
    """None if Triton kernels can run on `device`, else the reason against, as a clause."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'interlace[gpu]')"
    if torch.device(device).type == "cpu":
        if is_interpreted():
            return None
        return "Triton kernels run on GPUs; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
    if torch.device(device).type != "cuda":
        return f"runs on CUDA devices, not on {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    return _capability_refusal(device, LEAST_CAPABILITY)


def _capability_refusal(device: str, least: tuple[int, int]) -> str | None:
    found = torch.cuda.get_device_capability(torch.device(device))
    if found >= least:
        return None
    wanted, has = (".".join(map(str, version)) for version in (least, found))
    return f"needs a GPU of compute capability {wanted} or newer, {device} has {has}"


def auto_refusal(device: str) -> str | None:
    """Why `auto` passes Triton kernels over on `device`, if it should. Does not import triton."""
    return "Triton kernels are for GPUs" if torch.device(device).type == "cpu" else None


def dtype_refusal(dtype: str, device: str) -> str | None:
    """None if kernels compute in `dtype` on `device`, else the reason against. `refusal` was None."""
    allowed = ["bfloat16", "float16", "float32"]
    if torch.device(device).type == "cpu":
        allowed = ["float16", "float32"]  # the interpreter multiplies bfloat16 matrices wrongly
    return None if dtype in allowed else f"runs in {', '.join(allowed)} on {device}, not in {dtype}"


def fp8_refusal(device: str) -> str | None:
    """None if kernels read and write e4m3 on `device`, else the reason against, as a clause. `refusal` was None."""
    return None if torch.device(device).type == "cpu" else _capability_refusal(device, _FP8_CAPABILITY)


def multiprocessors(device: str) -> int:
    """How many programs `device` runs side by side, at one per multiprocessor."""
    if torch.device(device).type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(torch.device(device)).multi_processor_count)


def shared_memory(device: str) -> int:
    """Bytes of shared memory that one program may use on `device`, a GPU."""
    found = torch.cuda.get_device_properties(torch.device(device))
    return int(getattr(found, "shared_memory_per_block_optin", MAX_SHARED_MEMORY))


def to_device(values: Any, device: str) -> torch.Tensor:
    """A numpy array as a tensor on `device`, without waiting for the device."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the current device's stream; nothing to do if the grid is empty."""
    if all(grid):
        run: Callable[..., Any] = kernel[grid]
        run(*arguments, **constants)
