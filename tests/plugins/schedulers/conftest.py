"""`complaint`: what the suite says about a policy that is wrong on purpose."""

from __future__ import annotations

from typing import Any

import pytest

from interlace.interfaces.scheduler import Scheduler
from interlace.testing import SchedulerConformance
from interlace.testing.conformance import failures


@pytest.fixture
def complaint() -> Any:
    """`complaint(Policy, "history")` → why that test of the suite fails for the policy."""
    return complain


def complain(policy: type[Scheduler], test: str, **attributes: Any) -> str:
    """Why the suite's test named `test` fails for `policy`."""
    suite = type("Suite", (SchedulerConformance,), {"scheduler": policy, "seeds": range(12), **attributes})
    found = failures(suite, only=f"test_{test}")
    assert found, f"{policy.__name__} passes {test}"
    return next(iter(found.values()))
