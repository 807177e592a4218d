"""`complaint`: what the suite says about an executor that is wrong on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from interlace.interfaces.executor import Executor
from interlace.testing import ExecutorConformance
from interlace.testing.conformance import failures


@pytest.fixture
def complaint() -> Any:
    """`complaint(Broken, "shutdown")` → why that test of the suite fails for the executor."""
    return complain


def complain(executor: type[Executor], test: str, **attributes: Any) -> str:
    suite = type("Suite", (ExecutorConformance,), {"executor": executor, "seeds": range(1), **attributes})
    found = failures(suite, only=f"test_{test}")
    assert found, f"{executor.__name__} passes {test}"
    return next(iter(found.values()))
