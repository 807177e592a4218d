"""What kills ranks, nodes and the processes between, and what is said of it; a cluster that cannot do what is asked."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest

from interlace.engine.process_client import ProcessClient
from interlace.errors import CapacityError, EngineDeadError, InterlaceError
from interlace.interfaces.executor import WORKER_DIED
from interlace.plugins.executors.cluster.engine_link import ray_host
from interlace.plugins.executors.ray import RayExecutor
from interlace.testing import ExecutorConformance
from interlace.testing.executor_driver import Driver
from interlace.testing.executor_suite import GREEDY
from interlace.testing.faults import MESSAGE, unreadable

pytestmark = pytest.mark.slow
SPREAD = {"tensor_parallel": 2, "placement": "strict_spread"}


@pytest.fixture
def spec_of(ray_cluster, tmp_path):
    """`spec_of(option=…)`: the tiny model, on the cluster."""

    def make(**options):
        given = {"address": ray_cluster.address, **options}
        suite = type("Suite", (ExecutorConformance,), {"executor": "ray", "options": given})
        suite.setup_class()
        return suite().spec(tmp_path)

    return make


class Watched(Driver):
    """A driver that can wait for the executor's death."""

    def wait_for_death(self, seconds=30.0):
        for _ in range(int(seconds / 0.05)):
            if any(event.kind == WORKER_DIED for event in list(self.events)):
                return
            threading.Event().wait(0.05)
        raise AssertionError("nobody has noticed")

    def why(self):
        """What `check_health` says."""
        with pytest.raises(InterlaceError) as caught:
            self.executor.check_health()
        return str(caught.value)


@contextmanager
def started(spec):
    executor = RayExecutor(RayExecutor.Options(**spec.executor.options))
    try:
        yield Watched(executor, spec, 90.0)
    finally:
        executor.shutdown()


def step(driver):
    """Submit the next step of a new request; its future."""
    driver.add([1, 2, 3], **GREEDY)
    (future,) = driver.submit_all()
    return future


def generate(driver):
    request = driver.add([7, 8, 9], **GREEDY)
    driver.run()
    assert len(driver.tokens[request]) == 8
    return driver.tokens[request]


def wait_gone(*pids):
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(20)


def kill_node(raylet):
    """Everything that runs on a simulated node, at once: the machine is gone."""
    node = psutil.Process(raylet)
    for process in (node, *node.children(recursive=True)):
        process.kill()


# ── ranks ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_killed_while_idle_is_noticed_and_named(spec_of):
    with started(spec_of(**SPREAD)) as driver:
        generate(driver)
        pid = driver.executor.pids[1]
        os.kill(pid, signal.SIGKILL)
        driver.wait_for_death()
        assert f"rank 1 (pid {pid} on node " in driver.why()
        assert "its worker process has died" in driver.why(), "Ray's own words"
        assert step(driver).exception() is not None
        other = driver.executor.pids[0]
    wait_gone(other)


def test_a_rank_killed_in_the_middle_of_a_step_fails_the_step_with_the_cause(spec_of):
    with started(spec_of(**SPREAD)) as driver:
        pid = driver.executor.pids[1]
        os.kill(pid, signal.SIGSTOP)  # rank 0 waits for it in the first sum
        future = step(driver)
        with pytest.raises(TimeoutError):
            future.result(0.5)
        os.kill(pid, signal.SIGKILL)
        error = future.exception(30.0)
        assert f"rank 1 (pid {pid} on node " in str(error), "not the peer's broken connection"
        driver.wait_for_death()


def test_a_step_that_hangs_ends_with_the_stacks_of_the_ranks(spec_of):
    import msgspec

    spec = msgspec.structs.replace(spec_of(**SPREAD), step_timeout_s=3.0)
    with started(spec) as driver:
        pid = driver.executor.pids[1]
        os.kill(pid, signal.SIGSTOP)
        error = step(driver).exception(30.0)
        assert isinstance(error, TimeoutError) and "engine.step_timeout_s" in str(error)
        stacks = str(error.__cause__)
        assert "all_reduce" in stacks, "where rank 0 is"
        assert "it did not answer" in stacks.partition("rank 1 (")[2]
    wait_gone(pid)


def test_a_rank_that_fails_tells_with_its_own_traceback(spec_of):
    with started(spec_of(**SPREAD)) as driver:
        driver.spoil = 0
        driver.add([1, 2, 3], **GREEDY)
        driver.run()
        (failure,) = driver.failures
        assert "rank " in str(failure) and "failed: IndexError" in str(failure)
        assert "persistent_batch" in str(failure.__cause__.__cause__), "the traceback is the rank's"


def test_the_launcher_killed_takes_all_with_it(spec_of):
    with started(spec_of(address="auto")) as driver:
        generate(driver)
        os.kill(driver.executor.launcher_pid, signal.SIGKILL)
        driver.wait_for_death()
        assert "the process that speaks to Ray" in driver.why()
        pid = driver.executor.pids[0]
    wait_gone(pid)


ENGINE = """
import sys
import msgspec
from interlace.plugins.executors.cluster.engine_link import ray_host
from interlace.plugins.executors.ray import RayExecutor
from interlace.spec import ResolvedSpec

spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ResolvedSpec)
executor = RayExecutor(RayExecutor.Options(**spec.executor.options))
executor.start(spec, lambda event: None)
print(executor.launcher_pid, *executor.pids, flush=True)
while True:
    input()
"""


@pytest.mark.parametrize("own", [False, True], ids=["existing cluster", "own cluster"])
def test_an_engine_that_is_killed_leaves_nothing(spec_of, tmp_path, own):
    import msgspec

    spec = spec_of(**({"address": ""} if own else {}))
    given = tmp_path / "spec"
    given.write_bytes(msgspec.msgpack.encode(spec))
    script = ENGINE.replace("sys.stdin.buffer.read()", "open(sys.argv[1], 'rb').read()")
    command = [sys.executable, "-c", script, str(given)]
    engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with engine:
        told = [int(pid) for pid in engine.stdout.readline().split()]
        launcher = psutil.Process(told[0])
        family = [launcher, *launcher.children(recursive=True), *(psutil.Process(pid) for pid in told[1:])]
        folders = {value for process in family for value in process.cmdline() if "/interlace-ray-" in value}
        assert any("gcs_server" in process.name() for process in family) is own
        engine.kill()
    gone, alive = psutil.wait_procs(family, 20)
    assert gone and not alive
    for folder in folders:
        root = folder.partition("/interlace-ray-")
        path = "".join(root[:2]) + root[2].partition("/")[0]
        assert not os.path.exists(path.rpartition("=")[2])


# ── nodes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_node_is_named_and_the_next_engine_runs_on_what_is_left(spec_of, ray_cluster):
    third = ray_cluster.add_node()
    spec = spec_of(tensor_parallel=3, placement="strict_spread", placement_timeout_s=60.0)
    with started(spec) as driver:
        expected = generate(driver)
        parents = [psutil.Process(pid).ppid() for pid in driver.executor.pids]
        assert sorted(parents) == sorted(ray_cluster.raylets), "each rank on a node of its own"
        rank = parents.index(third)
        os.kill(driver.executor.pids[rank - 1], signal.SIGSTOP)  # so that the step does not end
        future = step(driver)
        kill_node(third)
        assert "is lost" in str(future.exception(30.0))
        driver.wait_for_death()  # long before Ray misses its heartbeats
        assert f"rank {rank} (pid {driver.executor.pids[rank]} on node " in driver.why()
        assert "is lost: nothing answers there any more" in driver.why()
        ranks = driver.executor.pids
    wait_gone(*ranks)
    too_much = spec_of(tensor_parallel=3, placement="strict_spread", placement_timeout_s=2.0)
    with pytest.raises(CapacityError) as caught, started(too_much):
        pass
    for words in (
        "room for 3 ranks",
        "1 CPU per rank, each on a node of its own",
        "within placement_timeout_s = 2 s",
    ):
        assert words in str(caught.value)
    with started(spec_of(**SPREAD, placement_timeout_s=60.0)) as driver:
        assert generate(driver) == expected


def test_a_rank_that_cannot_start_says_where_it_is(spec_of):
    import msgspec

    broken = msgspec.structs.replace(spec_of(**SPREAD), checkpoint=unreadable())
    with (
        pytest.raises(InterlaceError, match=rf"{MESSAGE} \(said by rank \d \(pid \d+ on node [\d.]+\)\)"),
        started(broken),
    ):
        pass


# ── starts that cannot be ─────────────────────────────────────────────────────────────────────────────────────


def test_no_room(spec_of):
    with pytest.raises(CapacityError) as caught, started(spec_of(threads_per_rank=64, placement_timeout_s=1.0)):
        pass
    text = str(caught.value)
    assert "no room for the rank" in text and "asked for 64 CPU per rank" in text
    assert "4 CPU" in text and "free in all: " in text, "what there is"


def test_nobody_at_the_address(spec_of):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        pytest.raises(InterlaceError, match=f"'127.0.0.1:{port}': no Ray cluster answers there"),
        started(spec_of(address=f"127.0.0.1:{port}")),
    ):
        pass


def test_something_else_at_the_address(spec_of):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        spec = spec_of(address=address, placement_timeout_s=3.0)
        with pytest.raises(InterlaceError, match=f"'{address}': Ray has not answered within 3 s"), started(spec):
            pass


# ── whole engines ─────────────────────────────────────────────────────────────────────────────────────────────


class Whole:
    """The client of an engine that is an actor, not started. `deaths`: what it said of the engine's end."""

    def __init__(self, spec):
        self.link = ray_host(spec.executor.options).link(spec)
        self.client = ProcessClient(spec, self.link)
        self.deaths = queue.SimpleQueue()

    def start(self):
        return self.client.start(lambda output: None, self.deaths.put)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.client.shutdown()


def test_an_engine_ends_with_its_launcher(spec_of):
    with Whole(spec_of(engine_core="cluster")) as whole:
        assert whole.client.health().status == "ok"
        os.kill(whole.link._launcher.pid, signal.SIGKILL)
        assert "is gone: the process that speaks to Ray (pid " in str(whole.deaths.get(timeout=30))
    wait_gone(whole.client.pid)


def test_a_frozen_engine_is_killed(spec_of, caplog):
    import msgspec

    spec = msgspec.structs.replace(spec_of(engine_core="cluster"), step_timeout_s=0.5)
    with Whole(spec) as whole:
        os.kill(whole.client.pid, signal.SIGSTOP)
        assert "it answered nothing for 0.5 s" in str(whole.deaths.get(timeout=30))
    wait_gone(whole.client.pid)
    assert not psutil.pid_exists(whole.client.pid)
    assert "it did not answer: it is stopped, or in native code" in caplog.text


def test_an_engine_that_is_killed_while_it_loads(spec_of, monkeypatch):
    whole = Whole(spec_of(engine_core="cluster"))
    real = whole.link.start

    def start_and_die():
        real()
        os.kill(whole.link.pid, signal.SIGKILL)

    monkeypatch.setattr(whole.link, "start", start_and_die)
    with pytest.raises(EngineDeadError, match=r"the engine process \(pid \d+ on node [\d.]+\) is gone: .*has died"):
        whole.start()


def test_an_engine_that_waits_for_room_can_be_given_up(spec_of):
    whole = Whole(spec_of(engine_core="cluster", threads_per_rank=64, placement_timeout_s=300.0))
    failures = queue.SimpleQueue()

    def start():
        try:
            whole.start()
        except InterlaceError as error:
            failures.put(error)

    thread = threading.Thread(target=start)
    thread.start()
    while whole.link._launcher is None:
        threading.Event().wait(0.05)
    launcher = whole.link._launcher.pid
    whole.client.shutdown()
    thread.join(30)
    assert not failures.empty() and not psutil.pid_exists(launcher)
