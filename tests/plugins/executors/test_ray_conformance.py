"""`ray` keeps its contract on a cluster of two nodes, and on one of its own."""

import pytest

from interlace.testing import ExecutorConformance
from interlace.testing.conformance import failures

pytestmark = pytest.mark.slow

TENSOR = {"tensor_parallel": 2, "placement": "strict_spread"}
STAGES = {"pipeline_parallel": 2, "placement": "strict_spread"}


class TestRay(ExecutorConformance):
    executor = "ray"
    seeds = range(1)

    @pytest.fixture(autouse=True)
    def use_cluster(self, ray_cluster, monkeypatch):
        options = {"address": ray_cluster.address}
        monkeypatch.setattr(type(self), "options", options)
        monkeypatch.setattr(type(self), "target_options", self.target.Options(**options))


@pytest.mark.parametrize(
    ("test", "options"),
    [
        ("results_are_those_of_a_worker", TENSOR),
        ("a_failing_step_is_reported", TENSOR),
        ("a_failed_start_says_why", TENSOR),
        ("results_are_those_of_a_worker", STAGES),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_ranks_on_two_nodes(ray_cluster, test, options):
    given = {"options": {**options, "address": ray_cluster.address}, "seeds": range(1)}
    assert not failures(type("Suite", (ExecutorConformance,), {"executor": "ray", **given}), only=f"test_{test}")


def test_a_cluster_of_its_own(ray_environment):
    suite = type("Suite", (ExecutorConformance,), {"executor": "ray", "options": {"tensor_parallel": 2}})
    assert not failures(suite, only="test_leaves_nothing_behind")
