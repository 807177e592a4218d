"""What `auto` takes on a GPU, on a CPU, and without Triton or CUDA, and what it says of those it passes over."""

from __future__ import annotations

import importlib.util

import msgspec
import pytest
import torch

from interlace import resolve
from interlace.errors import PluginError
from interlace.worker.device_start import stream_for
from interlace.worker.sizing import plan_attention, plan_kernels


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plans(spec, **changes):
    """(attention's selection, provider of kernels → its reason)."""
    spec = msgspec.structs.replace(spec, **changes)
    (attention,) = plan_attention(spec, spec.architecture.load()).selections
    return attention, {selection.name: selection.reason for selection in plan_kernels(spec)[1]}


def test_on_a_cpu_triton_has_no_part(tiny_spec):
    """Also where its interpreter is on, as in these tests."""
    attention, kernels = plans(tiny_spec(graphs=False, **{"cache.block_size": 16}))
    assert attention.name == "native" and attention.reason == "auto, choice 1 of 5"
    assert "triton" not in kernels
    assert "reference" not in kernels  # nothing asks for sampling on the device


def test_what_is_named_is_taken(tiny_spec):
    """The interpreter serves who asks for it."""
    settings = {"attention.use": "triton", "kernels.use": "triton", "cache.block_size": 16}
    attention, kernels = plans(tiny_spec(graphs=False, **settings))
    assert attention.name == "triton" and "sample" in kernels["triton"]


def test_without_cuda_torch_is_left(tiny_spec, without_cuda):
    attention, kernels = plans(tiny_spec(graphs=False), device="cuda", dtype="bfloat16")
    assert attention.name == "torch"
    assert "not native: runs on the CPU, not on cuda" in attention.reason
    assert "not triton: torch sees no CUDA device here" in attention.reason
    assert "make_linear" in kernels["torch"]
    assert "; not triton: torch sees no CUDA device here" in kernels["reference"]


def test_without_triton_torch_is_left(tiny_spec, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest)
    )
    attention, kernels = plans(tiny_spec(graphs=False), device="cuda")
    assert attention.name == "torch" and "not triton: Triton is not installed (pip install" in attention.reason
    assert "; not triton: Triton is not installed" in kernels["reference"]


def test_a_named_backend_that_cannot_run_is_an_error(tiny_spec, without_cuda):
    spec = tiny_spec(graphs=False, **{"attention.use": "triton", "cache.block_size": 16})
    with pytest.raises(PluginError, match=r"no attention provider .*: not triton: torch sees no CUDA device here"):
        plans(spec, device="cuda")


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_dtype_follows_the_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve.resolve_dtype("auto", "cuda") == dtype


@pytest.mark.parametrize(("files", "count", "device"), [(True, 2, "cuda"), (True, 0, "cpu"), (False, 2, "cpu")])
def test_device_follows_the_machine(monkeypatch, tmp_path, files, count, device):
    """A GPU that torch sees is taken; where the system shows none, torch is not even asked."""
    monkeypatch.setattr(resolve, "_GPU_FILES", (str(tmp_path),) if files else (str(tmp_path / "none"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve.resolve_device("auto") == device


@pytest.mark.parametrize(
    ("device", "memory", "share"), [("cpu", "auto", 0.4), ("cuda", "auto", 0.9), ("cuda", "0.5", 0.5)]
)
def test_the_share_of_memory_follows_the_device(tiny_spec, monkeypatch, device, memory, share):
    monkeypatch.setattr(resolve, "resolve_device", lambda wanted: device)
    spec = tiny_spec(graphs=False, **{"cache.memory": memory})
    assert (spec.cache.memory_share, spec.cache.memory_bytes) == (share, None)


def test_a_cpu_is_not_run_ahead_of():
    assert stream_for("cpu") is None
