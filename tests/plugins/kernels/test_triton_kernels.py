"""Kernels `triton`: where they run and why not, and values that a random suite does not meet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from interlace.interfaces.kernels import OPS, Kernels, KernelSpec
from interlace.plugins.kernels.triton import TritonKernels
from interlace.plugins.triton import runtime

KERNELS = TritonKernels(Kernels.Options(), KernelSpec("float32", "cpu"))
REFERENCE = Kernels(Kernels.Options(), KernelSpec("float32", "cpu"))


def _refusal(op="rms_norm", dtype="float32", device="cpu", weights="auto"):
    return TritonKernels.supports(op, KernelSpec(dtype, device, weights))


# ── Where they run ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_ops_run_in_the_interpreter():
    assert {op: _refusal(op) for op in OPS} == dict.fromkeys(OPS)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed (pip install 'interlace[gpu]')" in _refusal(device="cuda")


def test_on_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(runtime, "is_interpreted", lambda: False)
    assert "TRITON_INTERPRET=1" in _refusal()


def test_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in _refusal(device="cuda")


def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 or newer, cuda has 7.5" in _refusal(device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert _refusal(device="cuda") is None


def test_another_type_and_other_weights():
    assert "bfloat16, float16, float32, not in float64" in _refusal(dtype="float64")
    assert "not as 'int8'" in _refusal("make_linear", weights="int8")
    assert "decodes blocks" in _refusal("make_block_linear", weights="as-shipped")


def test_looking_at_the_plugin_does_not_import_triton():
    script = (
        "import sys; from interlace.plugins.kernels.triton import TritonKernels as T;"
        "from interlace.interfaces.kernels import Kernels, KernelSpec as S;"
        "T(Kernels.Options(), S('float32', 'cuda')); print(T.supports('rope', S('float32', 'cuda')));"
        "assert 'triton' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch sees no CUDA device here" in done.stdout


# ── Values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 576, 1025, 5000])
def test_norms_of_every_size(size):
    """Rows of heads share a program, long rows have one; neither may see the other's values."""
    generator = torch.Generator().manual_seed(size)
    x, residual = torch.randn(2, 3, size, generator=generator)
    x[1] *= 1e6  # a neighbour that would show
    weight = torch.randn(size, generator=generator)
    assert torch.allclose(KERNELS.rms_norm(x, weight, 1e-6, True), REFERENCE.rms_norm(x, weight, 1e-6, True), rtol=1e-5)
    wanted, total = REFERENCE.add_rms_norm(x, residual.clone(), weight, 1e-6, False)
    found, own_total = KERNELS.add_rms_norm(x, residual, weight, 1e-6, False)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(own_total, total)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_with_nan_or_infinity_harms_no_other():
    x = torch.ones(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    found = KERNELS.rms_norm(x, torch.ones(40), 1e-6, False)
    assert found[1].isnan().all()
    assert torch.allclose(found[[0, 3]], torch.ones(2, 40), atol=1e-5)
    gates = KERNELS.silu_mul(x)
    assert gates[1].isnan().sum() == 1 and torch.equal(gates[0], gates[3])


@pytest.mark.parametrize("activation", ["silu_mul", "gelu_mul"])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # as on a GPU: exp gives infinity, the quotient 0
def test_activations_at_the_ends(activation):
    """Large gates pass, small ones end at 0, exactly."""
    gate = torch.tensor([1e4, -1e4, 88.8, -88.8, 0.0, -0.0, 1e-40, 3e38])
    found = getattr(KERNELS, activation)(torch.cat((gate, torch.ones(8)))[None])[0]
    wanted = getattr(REFERENCE, activation)(torch.cat((gate, torch.ones(8)))[None])[0]
    assert not found.isnan().any()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-30)


def test_ids_and_positions_outside_their_tables_read_nothing():
    """A wrong number shows as NaN in its own row instead of killing the process."""
    table = torch.ones(5, 6)
    found = KERNELS.embedding(torch.tensor([4, 5, -1, 10**12, 0]), table)
    assert found.isnan().all(1).tolist() == [False, True, True, True, False]
    query = torch.ones(3, 1, 6)
    turned, _ = KERNELS.rope(query, query, torch.tensor([0, 5, -3]), table[:, :4])
    assert turned[..., :4].isnan().all(-1).flatten().tolist() == [False, True, True]
    assert torch.equal(turned[..., 4:], query[..., 4:])
