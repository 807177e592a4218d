"""Ranks that die, hang or cannot start: noticed quickly, with the true cause, and nothing stays behind.

Executors of real processes with a tiny model; `test_multiprocess_tree.py` kills whole trees.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import msgspec
import pytest

from interlace.config import load_settings
from interlace.errors import CapacityError, ConfigError
from interlace.interfaces.executor import WORKER_DIED
from interlace.plugin_manager import PluginManager
from interlace.plugins.executors.multiprocess import MultiprocessExecutor
from interlace.resolve import resolve
from interlace.testing import faults
from interlace.testing.executor_driver import Driver, UnhealthyError
from interlace.testing.executor_suite import GREEDY, MODEL, ExecutorConformance
from interlace.testing.footprint import Footprint

SOON_S = 60.0
"""Generous: what is measured here takes a fraction of a second on a machine that does nothing else."""


class Suite(ExecutorConformance):
    """For its means; its tests are elsewhere."""

    __test__ = False
    executor = "multiprocess"


@pytest.fixture
def spec(tmp_path):
    return Suite().spec(tmp_path)


@pytest.fixture
def started(spec):
    """`started(tensor_parallel=2)` → a driver of a started executor; checks that nothing is left of it."""
    drivers, before = [], Footprint.take()

    def start(changed=spec, **options):
        executor = MultiprocessExecutor(MultiprocessExecutor.Options(**options))
        drivers.append(Driver(executor, changed, 60.0))
        return drivers[-1]

    yield start
    during = Footprint.take()
    for driver in drivers:
        driver.executor.shutdown()
    assert not before.left_of(during, 5.0)


def wait_until(condition, timeout=SOON_S):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def whole_text(error):
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_idle(started, victim):
    driver = started(tensor_parallel=2)
    pid = driver.executor.pids[victim]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: any(event.kind == WORKER_DIED for event in driver.events))
    with pytest.raises(UnhealthyError, match=rf"rank {victim} \(pid {pid}\) was killed by signal 9 \(SIGKILL\)"):
        driver.check_health()
    driver.add([1, 2, 3], **GREEDY)
    (future,) = driver.submit_all()
    assert "was killed by signal 9" in str(future.exception(SOON_S))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_step(started, spec, victim):
    """The first one is in the step, the second one waits for the next."""
    driver = started(msgspec.structs.replace(spec, logits_processors=(faults.stuck(),)), tensor_parallel=2)
    driver.add([1, 2, 3], logits_processors={faults.stuck().name: {}}, **GREEDY)
    (future,) = driver.submit_all()
    with pytest.raises(TimeoutError):
        future.result(0.3)
    os.kill(driver.executor.pids[victim], signal.SIGKILL)
    error = future.exception(SOON_S)
    assert f"rank {victim} " in str(error) and "was killed by signal 9" in str(error)
    wait_until(lambda: not any(alive(pid) for pid in driver.executor.pids))


@pytest.mark.slow
def test_the_cause_is_the_rank_that_is_gone_and_not_the_one_that_misses_it(started):
    """Gloo tells the survivor first, and it says so at once; the error is what happened to the other. The same for
    tensor ranks: test_blame.py."""
    driver = started(pipeline_parallel=2)
    first = driver.executor.pids[0]
    os.kill(first, signal.SIGSTOP)
    driver.add([1, 2, 3], **GREEDY)
    (future,) = driver.submit_all()
    with pytest.raises(TimeoutError):
        future.result(0.5)
    os.kill(first, signal.SIGKILL)
    assert f"rank 0 (pid {first}) was killed by signal 9" in str(future.exception(SOON_S))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_step_that_fails_on_one_rank_carries_its_traceback(started):
    """The plan names a slot that does not exist; with several ranks that is the end."""
    driver = started(tensor_parallel=2)
    driver.spoil = 0
    driver.add([1, 2, 3], **GREEDY)
    driver.run()
    (error,) = driver.failures
    assert "failed: IndexError" in str(error) and "rank " in str(error)
    assert "persistent_batch.py" in whole_text(error), "the rank's own traceback"
    with pytest.raises(UnhealthyError, match="IndexError"):
        driver.check_health()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stuck in Python", "stopped"])
def test_a_rank_that_hangs(started, spec, how):
    """After most of `step_timeout_s`, before the engine's own watchdog gives up; the error says where everybody is."""
    changed = msgspec.structs.replace(spec, logits_processors=(faults.stuck(),), step_timeout_s=1.5)
    driver = started(changed, tensor_parallel=2)
    params = dict(GREEDY)
    if how == "stuck in Python":
        params["logits_processors"] = {faults.stuck().name: {}}
    else:
        os.kill(driver.executor.pids[1], signal.SIGSTOP)
    driver.add([1, 2, 3], **params)
    (future,) = driver.submit_all()
    error = future.exception(SOON_S)
    assert isinstance(error, TimeoutError) and "engine.step_timeout_s" in str(error)
    stacks = whole_text(error)
    if how == "stuck in Python":
        assert "in apply" in stacks and "faults.py" in stacks
    else:
        assert "board.py" in stacks, "rank 0 waits for the other"
        assert "it did not answer: it is stopped" in stacks


def test_an_idle_executor_is_not_hung_and_costs_nothing(started, spec):
    """Longer than the step timeout; ranks, and the thread that watches them, sleep."""
    driver = started(msgspec.structs.replace(spec, step_timeout_s=1.6), tensor_parallel=2)
    ranks = driver.executor.control("ranks")
    assert [rank["pid"] for rank in ranks] == driver.executor.pids
    began = sum(os.times()[:2])
    time.sleep(2.0)
    spent = sum(os.times()[:2]) - began
    again = driver.executor.control("ranks")
    spent += sum(new["processor_seconds"] - old["processor_seconds"] for old, new in zip(ranks, again, strict=True))
    assert spent < 0.2, f"{spent:.2f} s of processor time in two seconds without work"
    driver.add([1, 2, 3], **GREEDY)
    driver.run()
    driver.check_health()
    steps, calls = (driver.executor.control("ranks")[1][key] for key in ("steps", "exchanges"))
    assert steps == 8 and calls == {"all_reduce": 8 * (1 + 2 * 2), "all_gather": 8}


# ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────


def failed_start(spec, during=lambda executor: None, **options):
    """(what `start` raises, seconds it took after `during` had been called)."""
    executor = MultiprocessExecutor(MultiprocessExecutor.Options(**options))
    before = Footprint.take()
    disturb = threading.Thread(target=during, args=(executor,))
    disturb.start()
    with pytest.raises(Exception) as caught:
        executor.start(spec, lambda event: None)
    disturb.join()
    left = Footprint.take()
    executor.shutdown()
    executor.shutdown()
    assert not before.left_of(left, 5.0)
    return caught.value


def test_an_impossible_option_is_an_error_before_anything_starts(spec):
    error = failed_start(spec, tensor_parallel=2, devices=["cpu"])
    assert isinstance(error, ConfigError) and "give one per rank" in str(error)


@pytest.mark.slow
def test_a_start_without_memory_says_so(spec):
    cache = msgspec.structs.replace(spec.cache, memory_bytes=1 << 50)
    error = failed_start(msgspec.structs.replace(spec, cache=cache), tensor_parallel=2)
    assert isinstance(error, CapacityError) and "cache.memory asks for 1024.0 TiB" in str(error)


@pytest.mark.slow
def test_ranks_that_vanish_while_they_load(spec):
    error = failed_start(msgspec.structs.replace(spec, checkpoint=faults.crashing()), pipeline_parallel=2)
    assert f"ended with status {faults.CRASH_STATUS} without a word" in str(error) and "rank " in str(error)


@pytest.mark.slow
def test_a_rank_that_is_killed_while_it_loads(spec):
    def kill_one(executor):
        wait_until(lambda: len(executor.pids) == 2, 30)
        time.sleep(0.5)
        os.kill(executor.pids[1], signal.SIGKILL)

    error = failed_start(msgspec.structs.replace(spec, checkpoint=faults.stuck_loading()), kill_one, tensor_parallel=2)
    assert "rank 1 " in str(error) and "was killed by signal 9" in str(error)


@pytest.mark.slow
def test_a_start_that_does_not_end_says_where_it_is(spec):
    broken = msgspec.structs.replace(spec, checkpoint=faults.stuck_loading())
    for timeout in (4.0, 20.0, 100.0):  # what is enough to come as far as the weights depends on what else runs
        error = failed_start(broken, start_timeout_s=timeout)
        assert isinstance(error, TimeoutError)
        assert f"not ready after {timeout:g} s (executor option start_timeout_s)" in str(error)
        if "faults.py" in whole_text(error):
            break
    assert "in weights" in whole_text(error)


@pytest.mark.slow
def test_a_model_that_cannot_be_split_says_why(spec, tmp_path):
    """More tensor ranks than query heads; the key and what is allowed are named."""
    error = failed_start(spec, tensor_parallel=5)
    assert isinstance(error, ConfigError) and "tensor_parallel = 5" in str(error), repr(error)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_starts_leave_nothing_behind(spec, tmp_path):
    """Processes, threads, descriptors, shared memory: the same after 50 as after two. Every tenth has two ranks."""

    def cycle(number):
        options = {"tensor_parallel": 2} if number % 10 == 0 else {}
        executor = MultiprocessExecutor(MultiprocessExecutor.Options(**options))
        driver = Driver(executor, spec, 60.0)
        driver.add([1, 2, 3], temperature=0.0, max_tokens=2)
        driver.run()
        executor.shutdown()

    cycle(0)
    before, names = Footprint.take(), set(os.listdir("/dev/shm"))
    for number in range(50):
        cycle(number)
    assert not before.left_of(before, 5.0)
    assert not [name for name in set(os.listdir("/dev/shm")) - names if "interlace" in name]


def test_options_come_from_flags_as_they_do_for_every_plugin(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    flags = {"executor.use": "multiprocess", "model": str(tmp_path), "checkpoint.use": "dummy"}
    given = {"tensor_parallel": "2", "devices": '["cpu","cpu"]', "cores": "auto", "all_reduce": "gloo"}
    flags |= {f"executor.options.multiprocess.{name}": text for name, text in given.items()}
    loaded = load_settings(cli=flags, env={})
    component = resolve(loaded, PluginManager(loaded.settings)).executor
    options = component.load_options(component.load())
    assert (options.world, options.devices, options.cores, options.all_reduce) == (2, ["cpu", "cpu"], ["auto"], "gloo")
