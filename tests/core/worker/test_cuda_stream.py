"""How `CudaStream` uses torch.cuda, on a machine without a GPU: the calls, in order, and what it keeps alive."""

from __future__ import annotations

import gc
import inspect
import weakref
from unittest.mock import MagicMock

import pytest
import torch

from interlace.worker.streams import CudaStream


@pytest.fixture
def cuda(monkeypatch):
    """Everything of torch.cuda that the stream calls, recorded in one list of calls."""
    names = (
        "graph_pool_handle",
        "device",
        "stream",
        "current_stream",
        "synchronize",
        "CUDAGraph",
        "graph",
        "Event",
        "Stream",
    )
    fake = MagicMock()
    for name in names:
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_the_real_names_take_these_arguments():
    graph = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"pool", "stream", "capture_error_mode"} <= set(graph)
    assert "blocking" in inspect.signature(torch.cuda.Event.__new__).parameters
    for name in ("mem_get_info", "reset_peak_memory_stats", "max_memory_reserved", "memory_allocated", "empty_cache"):
        assert callable(getattr(torch.cuda, name))


def test_submit_records_an_event_that_sleeps(cuda):
    done = []
    completion = CudaStream(torch.device("cuda", 0)).submit(lambda: done.append(cuda.Event.called))
    assert done == [False], "the event comes after the work"
    cuda.Event.assert_called_once_with(blocking=True)
    completion.wait()
    cuda.Event.return_value.synchronize.assert_called_once_with()


def test_a_graph_keeps_its_work_alive(cuda):
    class Held:
        """Stands for the tensors of a capture."""

    held = Held()
    runs = []

    def work(owned=held):
        runs.append(cuda.graph.called)

    replay = CudaStream(torch.device("cuda", 0)).capture(work)
    assert runs == [False, True], "once to warm up, once in the capture"
    alive = weakref.ref(held)
    del held, work
    gc.collect()
    replay()
    assert len(runs) == 2 and cuda.CUDAGraph.return_value.replay.call_count == 1
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


def test_a_graph_is_captured_on_a_stream_of_its_own_device(cuda):
    """The warm-up runs on it, too; both wait for what was submitted before."""
    CudaStream(torch.device("cuda", 1)).capture(lambda: cuda.work())
    cuda.Stream.assert_called_once_with(torch.device("cuda", 1))
    cuda.device.assert_called_with(torch.device("cuda", 1))
    own = cuda.Stream.return_value
    assert cuda.graph.call_args.kwargs["stream"] is own
    order = [name for name, *_ in cuda.mock_calls if name in ("synchronize", "stream", "work", "graph")]
    assert order == ["synchronize", "stream", "work", "synchronize", "stream", "graph", "work"]
    assert [call.args for call in cuda.stream.call_args_list] == [(own,), (cuda.current_stream.return_value,)]


def test_a_capture_that_fails_raises(cuda):
    cuda.graph.return_value.__exit__.side_effect = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaStream(torch.device("cuda", 0)).capture(lambda: None)
    assert cuda.stream.return_value.__exit__.called, "the stream is what it was"
