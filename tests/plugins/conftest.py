"""What the tests of the native kernels and of native attention share."""

from __future__ import annotations

import pytest
import torch


def pytest_generate_tests(metafunc):
    """A test with the argument `isa` runs with every instruction set of this CPU."""
    if "isa" in metafunc.fixturenames:
        from interlace.plugins.native.library import supported_isas

        metafunc.parametrize("isa", supported_isas())


@pytest.fixture
def use_threads():
    """Sets how many threads kernels that are made from now on use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
