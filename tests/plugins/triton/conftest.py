"""What tests of Triton kernels share: kernels run in Triton's interpreter, which tests/conftest.py switches on for the
whole test process. What needs the real compiler runs in a process without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MAX_SHARED_MEMORY = 227 * 1024
"""What one program may have on a Hopper GPU."""


@pytest.fixture(scope="session")
def compile_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a child process in which Triton compiles instead of interpreting; all processes of a test run
    share what was compiled."""
    run = tmp_path_factory.getbasetemp()
    shared = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(shared / "triton-cache")}


@pytest.fixture(scope="session")
def compile_kernels(compile_environment: dict[str, str]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Compile kernels for a Hopper GPU, which need not be there. A case has

    - `kernel`: "module:function";
    - `types`: argument → Triton type (`*bf16`, `i32`, `fp32`), with a `!` behind numbers that are multiples of 16;
    - `constants`: argument → value of its compile-time arguments (None for a tensor that is not given);
    - `options`: num_warps and the like; `asm`: kinds of code to return (`ttgir`, `ptx`).

    Fails where one does not compile or needs too much shared memory. Returns for each its `shared` bytes, the bytes of
    `stack` of a thread (what did not fit into registers), and `asm`."""

    def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        child = [sys.executable, str(Path(__file__).with_name("aot_child.py"))]
        done = subprocess.run(
            child, input=json.dumps(cases), env=compile_environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        for case, result in zip(cases, results, strict=True):
            assert "error" not in result, f"{case}: {result['error']}"
            assert result["shared"] <= MAX_SHARED_MEMORY, f"{case} takes {result['shared']} bytes of shared memory"
        return results

    return run
