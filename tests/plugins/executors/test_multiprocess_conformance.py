"""`multiprocess` keeps its contract, whatever the number of ranks."""

from __future__ import annotations

import pytest

from interlace.testing import ExecutorConformance
from interlace.testing.conformance import failures


@pytest.mark.slow
class TestOneRank(ExecutorConformance):
    executor = "multiprocess"
    seeds = range(2)


@pytest.mark.slow
class TestTwoTensorRanks(ExecutorConformance):
    executor = "multiprocess"
    options = {"tensor_parallel": 2}  # noqa: RUF012
    seeds = range(2)


def check(test, **options):
    """One test of the suite."""
    assert any(test in name for name in dir(ExecutorConformance))
    attributes = {"executor": "multiprocess", "options": options, "seeds": range(1)}
    assert failures(type("Suite", (ExecutorConformance,), attributes), only=test) == {}


def test_two_ranks_compute_what_one_does():
    check("test_results_are_those_of_a_worker", tensor_parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "test", ["test_results", "test_empty_plans", "test_a_failing_step", "test_leaves_nothing_behind", "test_shutdown"]
)
def test_stages(test):
    check(test, pipeline_parallel=2)


@pytest.mark.slow
@pytest.mark.parametrize("test", ["test_results", "test_leaves_nothing_behind"])
def test_ranks_in_stages(test):
    check(test, tensor_parallel=2, pipeline_parallel=2)
