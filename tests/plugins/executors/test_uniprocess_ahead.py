"""`uniprocess` keeps its contract also where it runs ahead of a device, with and without device graphs."""

from __future__ import annotations

import msgspec
import pytest

from interlace.plugins.executors.uniprocess import UniprocessExecutor
from interlace.spec import Component
from interlace.testing import ExecutorConformance
from interlace.testing.fake_stream import FakeStream

GRAPHS = Component(kind="attention", name="reference", target="interlace.testing.reference:ReferenceAttention")


class Ahead(UniprocessExecutor):
    def make_stream(self):
        return FakeStream(eagerness=0.3)


class Suite(ExecutorConformance):
    executor = Ahead
    settings = {"threads": 1}  # noqa: RUF012


class TestWithGraphs(Suite):
    def spec(self, folder, **changes):
        return super().spec(folder, **{"attention": (GRAPHS,), **changes})


@pytest.mark.slow
class TestKernelByKernel(Suite):
    seeds = range(6)


def test_it_has_two_steps_in_flight(tmp_path):
    suite = TestWithGraphs()
    suite.setup_class()
    with suite.driver(suite.spec(tmp_path)) as driver:
        assert driver.info.max_in_flight == 2 and driver.info.feeds_tokens
    gpu = msgspec.structs.replace(suite.spec(tmp_path).gpu, steps_in_flight=3)
    with suite.driver(suite.spec(tmp_path, gpu=gpu)) as driver:
        assert driver.info.max_in_flight == 3


def test_on_a_cpu_a_step_is_done_when_submit_returns(tmp_path):
    class Plain(Suite):
        executor = UniprocessExecutor

    suite = Plain()
    suite.setup_class()
    with suite.driver(suite.spec(tmp_path)) as driver:
        assert driver.info.max_in_flight == 1
        driver.add([1, 2], temperature=0.0, max_tokens=2)
        assert [future.done() for future in driver.submit_all()] == [True]
