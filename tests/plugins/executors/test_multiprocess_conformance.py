"""`multiprocess` keeps its contract, whatever the number of ranks."""

import pytest

from interlace.testing import ExecutorConformance


class TestOneRank(ExecutorConformance):
    executor = "multiprocess"


class TestTwoTensorRanks(ExecutorConformance):
    executor = "multiprocess"
    options = {"tensor_parallel": 2}  # noqa: RUF012
    seeds = range(1)


class TestTwoStages(ExecutorConformance):
    executor = "multiprocess"
    options = {"pipeline_parallel": 2}  # noqa: RUF012
    seeds = range(1)


@pytest.mark.slow
class TestTwoByTwo(ExecutorConformance):
    executor = "multiprocess"
    options = {"tensor_parallel": 2, "pipeline_parallel": 2}  # noqa: RUF012
    seeds = range(1)
