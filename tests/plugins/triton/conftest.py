"""What tests of Triton kernels share: kernels run in Triton's interpreter, which tests/conftest.py switches on for the
whole test process. What needs the real compiler runs in a process without it: `compile_environment`."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def compile_environment() -> dict[str, str]:
    """The environment of a child process in which Triton compiles instead of interpreting."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
