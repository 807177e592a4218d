"""`multiprocess` keeps its contract, whatever the number of ranks."""

from interlace.testing import ExecutorConformance


class TestOneRank(ExecutorConformance):
    executor = "multiprocess"
