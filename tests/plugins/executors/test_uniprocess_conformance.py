"""`uniprocess` keeps its contract."""

from interlace.testing import ExecutorConformance


class TestUniprocess(ExecutorConformance):
    executor = "uniprocess"
