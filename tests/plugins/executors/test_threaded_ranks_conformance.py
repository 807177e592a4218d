"""Workers as ranks of one model keep the contract of executors: tensor ranks, pipeline stages, and both.

They are threads of one process here: what the workers do is the same wherever they run."""

import pytest

from interlace.testing import ExecutorConformance
from interlace.testing.ranks import ThreadedRanks


class TestTwoTensorRanks(ExecutorConformance):
    executor = ThreadedRanks
    options = {"tensor_parallel": 2}  # noqa: RUF012
    seeds = range(1)


class TestTwoStages(ExecutorConformance):
    executor = ThreadedRanks
    options = {"pipeline_parallel": 2}  # noqa: RUF012
    seeds = range(1)


@pytest.mark.slow
class TestThreeTensorRanks(ExecutorConformance):
    """Uneven, and one KV head on two ranks."""

    executor = ThreadedRanks
    options = {"tensor_parallel": 3}  # noqa: RUF012


@pytest.mark.slow
class TestTwoByTwo(ExecutorConformance):
    executor = ThreadedRanks
    options = {"tensor_parallel": 2, "pipeline_parallel": 2}  # noqa: RUF012
