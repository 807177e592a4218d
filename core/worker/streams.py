"""`Stream`: a device that works through what it is given in order, while the host goes on.

The device runner knows a GPU only through this class. `CudaStream` is the real one; a fake one that works as late as it
may is in `interlace.testing.fake_stream`, so that the same runner is tested without a GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Work = Callable[[], None]
"""What the device is to do: calls of torch and of kernels, in order. It may read host memory at any time until it is
complete, so what it reads must not change until then; it must not wait for the device."""


class Completion(ABC):
    """Some work that was given to a stream."""

    @abstractmethod
    def wait(self) -> None:
        """Block, without using a processor, until the work is complete. Raises what it failed with."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `wait` would return, or raise, at once."""


class Stream(ABC):
    """Runs work in the order of submission. Used from one thread at a time."""

    device: torch.device

    @abstractmethod
    def submit(self, work: Work) -> Completion:
        """Run `work` after all that was submitted before. Raises what goes wrong while it is handed over."""

    @abstractmethod
    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory [num_bytes] uint8, zeroed, from and to which the device copies by itself."""

    @abstractmethod
    def capture(self, work: Work) -> Work:
        """Make `work` one call, to be used within `submit`. `work` is run now, at least once, so it must do no harm;
        the call repeats what the device did, and none of the Python around it. It keeps `work` alive. Waits for
        everything submitted before. Raises if `work` cannot be captured; the stream goes on then."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything submitted. Raises only if the device can do no more work."""

    @abstractmethod
    def peak_memory(self, work: Work) -> int:
        """Bytes of device memory that `work` takes at most beyond what is taken already. Runs it, and waits."""

    def current(self) -> AbstractContextManager[Any]:
        """Within it, this thread's kernels go to this device, and to this stream of it."""
        return nullcontext()

    @abstractmethod
    def close(self) -> None:
        """Give memory that is only kept for reuse back to the device."""


class _CudaCompletion(Completion):
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def ready(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class CudaStream(Stream):
    """A CUDA device's default stream. Threads have a current device of their own, so it is set at every entry."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()  # graphs never run at once, so they share their memory
        # What torch captures on by default belongs to the device on which this process captured first.
        self._capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(self, work: Work) -> Completion:
        with self.current():
            work()
            # blocking: waiting for it sleeps instead of spinning
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        return _CudaCompletion(event)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device)

    def capture(self, work: Work) -> Work:
        with self.current():
            torch.cuda.synchronize()
            # On the same stream: libraries keep a workspace per stream, which must not come from the graphs' memory.
            with torch.cuda.stream(self._capture_stream):
                work()  # also compiles kernels, which a capture cannot
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The outer context restores the stream, which the inner one does not if the capture fails. thread_local:
            # other threads of the process may use CUDA meanwhile, another engine's for one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"
                ),
            ):
                work()

        def replay(captured: Work = work) -> None:  # `captured` holds the tensors the graph reads and writes
            graph.replay()

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def peak_memory(self, work: Work) -> int:
        with self.current():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            # reserved, not allocated: what fragmentation costs is lost to the cache as well
            peak = max(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) - before
            torch.cuda.empty_cache()
        return max(0, int(peak))

    def close(self) -> None:
        with self.current():
            torch.cuda.empty_cache()
