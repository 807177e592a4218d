"""`complaint`: what the suite says about an executor that is wrong on purpose. `ray_cluster`: simulated nodes."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interlace.interfaces.executor import Executor
from interlace.testing import ExecutorConformance
from interlace.testing.conformance import failures

KEEPER = Path(__file__).with_name("ray_keeper.py")


@pytest.fixture
def complaint() -> Any:
    """`complaint(Broken, "shutdown")` → why that test of the suite fails for the executor."""
    return complain


def complain(executor: type[Executor], test: str, **attributes: Any) -> str:
    suite = type("Suite", (ExecutorConformance,), {"executor": executor, "seeds": range(1), **attributes})
    found = failures(suite, only=f"test_{test}")
    assert found, f"{executor.__name__} passes {test}"
    return next(iter(found.values()))


class SimulatedCluster:
    """A Ray cluster whose nodes are groups of processes on this machine."""

    def __init__(self, folder: str, cpus: int) -> None:
        self._keeper = subprocess.Popen(
            [sys.executable, str(KEEPER), folder, str(cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._hear()

    def _hear(self) -> None:
        assert self._keeper.stdout is not None
        told = json.loads(self._keeper.stdout.readline())
        self.address: str = told["address"]
        self.raylets: list[int] = told["raylets"]
        """Process ids of the nodes' own processes; the nodes end with them."""

    def add_node(self) -> int:
        """The process id of the new node's raylet."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.write("add\n")
        self._keeper.stdin.flush()
        self._hear()
        return self.raylets[-1]

    def shutdown(self) -> None:
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.read()  # until it has ended
        self._keeper.stdout.close()
        self._keeper.wait()


@pytest.fixture(scope="module")
def ray_environment() -> Iterator[str]:
    """A directory for Ray's files, and an environment that keeps it to that and to itself."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short name: there are sockets in it
    Path(folder, "ray").mkdir()  # of RAY_TMPDIR Ray takes this
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ray_cluster(ray_environment: str) -> Iterator[SimulatedCluster]:
    """Two nodes of four processors each."""
    cluster = SimulatedCluster(ray_environment, 4)
    cluster.add_node()
    yield cluster
    cluster.shutdown()
