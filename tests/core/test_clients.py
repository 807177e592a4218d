"""Both transports of the engine client, over a scripted executor; the subprocess one with real processes."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from pathlib import Path

import pytest

from interlace.assemble import make_client
from interlace.clock import MonotonicClock
from interlace.errors import EngineDeadError, PluginImportError
from interlace.messages import EngineRequest, SamplingParams
from interlace.testing.checked_worker import generate_alone
from interlace.testing.executor import ScriptedExecutor, scripted_spec

FCFS = "interlace.plugins.schedulers.fcfs:Fcfs"
BOTH = pytest.mark.parametrize("process", ["inline", "subprocess"])


def request(id="a", max_tokens=5, **fields) -> EngineRequest:
    values = {"prompt_token_ids": [1, 2, 3], "arrival_time": 0.0, "seed": 0} | fields
    return EngineRequest(id=id, params=SamplingParams(max_tokens=max_tokens), **values)


class Front:
    """A client and what it said."""

    def __init__(self, process, scheduler=FCFS, **options):
        self.client = make_client(scripted_spec(scheduler, **options), process, MonotonicClock())
        self.outputs, self.deaths, self.events = [], [], []
        self.changed = threading.Condition()

    def start(self):
        return self.client.start(self._on_output, self._on_death, self.events.append)

    def _on_output(self, output):
        with self.changed:
            self.outputs.append(output)
            self.changed.notify_all()

    def _on_death(self, error):
        with self.changed:
            self.deaths.append(error)
            self.changed.notify_all()

    def __enter__(self):
        self.info = self.start()
        return self

    def __exit__(self, *error):
        self.client.shutdown()

    def wait(self, condition, timeout=10.0):
        with self.changed:
            assert self.changed.wait_for(condition, timeout), "it did not happen"

    @property
    def finished(self):
        return {name: info for output in self.outputs for name, info in output.finished.items()}

    def tokens(self):
        return [token for output in self.outputs for token in output.token_ids]


def chain(error: BaseException) -> str:
    """The whole story of an error, causes included."""
    return "".join(traceback.format_exception(error))


# ── both transports ─────────────────────────────────────────────────────────────────────────────────────────────


@BOTH
class TestLife:
    def test_requests_are_answered(self, process):
        with Front(process, max_in_flight=2) as front:
            assert (front.info.max_in_flight, front.info.kv.num_blocks) == (2, 64)
            assert [event.kind for event in front.events] == ["progress"]
            front.client.add([request(max_tokens=9)])
            front.wait(lambda: front.finished)
            executor = ScriptedExecutor(ScriptedExecutor.Options())
            assert front.tokens() == generate_alone(request(max_tokens=9), executor.next_token, 256)[0]
            assert front.finished["a"].reason == "length"
        assert front.deaths == []

    def test_an_abort_ends_a_request(self, process):
        with Front(process, delay_s=0.01) as front:
            front.client.add([request("a", 200), request("b", 3)])
            front.wait(lambda: front.outputs)
            front.client.abort(["a", "nobody"])
            front.wait(lambda: len(front.finished) == 2)
            assert front.finished["a"].reason == "abort"
            assert front.client.control("free_blocks") == 63

    def test_health_comes_from_the_loop(self, process):
        with Front(process) as front:
            front.client.add([request(max_tokens=4)])
            front.wait(lambda: front.finished)
            health = front.client.health()
            assert (health.status, health.steps, health.num_running) == ("ok", 4, 0)

    def test_a_loop_that_does_not_answer_is_an_error(self, process):
        with Front(process, delay_s=0.5) as front:
            front.client.add([request()])
            time.sleep(0.1)
            with pytest.raises(EngineDeadError, match=r"did not answer within 0.05 s"):
                front.client.health(timeout=0.05)
            front.client.abort(["a"])

    def test_control_gives_values_and_errors(self, process):
        with Front(process) as front:
            assert front.client.control("echo", word="hello", numbers=[1, 2]) == {"word": "hello", "numbers": [1, 2]}
            assert front.client.control("reset_prefix_cache") is None
            with pytest.raises(ValueError, match=r"^executor ScriptedExecutor offers no operation 'dance'$"):
                front.client.control("dance")

    def test_threads_may_use_it_at_once(self, process):
        with Front(process) as front:
            errors = []

            def use(number):
                try:
                    for index in range(10):
                        front.client.add([request(f"{number}.{index}", 2)])
                        assert front.client.control("echo", number=number, index=index)["number"] == number
                except Exception as error:
                    errors.append(error)

            threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            front.wait(lambda: len(front.finished) == 40)
            assert errors == []


@BOTH
class TestFailingToStart:
    def test_the_true_cause_is_raised_with_its_text_and_its_own_cause(self, process):
        front = Front(process, start_error="there is no such disk")
        with pytest.raises(RuntimeError, match=r"^there is no such disk$") as caught:
            front.start()
        assert "ValueError: a scripted cause" in chain(caught.value)
        assert "in start" in chain(caught.value), "the place in the executor is in the traceback"
        assert front.deaths == []
        front.client.shutdown()

    def test_a_scheduler_that_cannot_be_imported(self, process):
        front = Front(process, scheduler="interlace_nowhere:Nothing")
        with pytest.raises(PluginImportError, match="cannot be imported from 'interlace_nowhere:Nothing'") as caught:
            front.start()
        assert "No module named 'interlace_nowhere'" in chain(caught.value)
        front.client.shutdown()

    def test_it_cannot_be_used_then(self, process):
        front = Front(process, start_error="no")
        with pytest.raises(RuntimeError):
            front.start()
        with pytest.raises(EngineDeadError):
            front.client.add([request()])
        front.client.shutdown()


@BOTH
class TestEnds:
    def test_shutdown_twice_and_before_start(self, process):
        front = Front(process)
        front.client.shutdown()
        front = Front(process)
        front.start()
        front.client.shutdown()
        front.client.shutdown()

    def test_shutdown_drops_what_runs_and_is_no_death(self, process):
        front = Front(process, delay_s=0.01)
        front.start()
        front.client.add([request(max_tokens=200)])
        front.wait(lambda: front.outputs)
        front.client.shutdown()
        assert front.deaths == []
        assert front.finished == {}

    def test_nothing_can_be_asked_before_and_after(self, process):
        front = Front(process)
        with pytest.raises(EngineDeadError, match="was not started"):
            front.client.add([request()])
        front.start()
        front.client.shutdown()
        for use in (
            lambda: front.client.add([request()]),
            lambda: front.client.abort(["a"]),
            lambda: front.client.health(),
            lambda: front.client.control("echo"),
        ):
            with pytest.raises(EngineDeadError, match="the engine was shut down"):
                use()

    def test_a_failed_step_is_told_and_the_engine_goes_on(self, process):
        with Front(process, fail_steps=(1,)) as front:
            front.client.add([request("a")])
            front.wait(lambda: "a" in front.finished)
            assert front.finished["a"].error == "the step failed: RuntimeError: scripted failure of step 1"
            front.client.add([request("b")])
            front.wait(lambda: "b" in front.finished)
            assert front.finished["b"].reason == "length"

    def test_a_death_is_told_once_with_its_cause(self, process):
        with Front(process, fail_steps=(1,), healthy_after_failure=False) as front:
            front.client.add([request()])
            front.wait(lambda: front.deaths)
            [death] = front.deaths
            assert "the executor cannot go on: the scripted executor is broken" in str(death)
            assert "RuntimeError: scripted failure of step 1" in chain(death)
            assert "a" not in front.finished, "it is told of the death, which carries the cause"
            for use in (front.client.health, lambda: front.client.add([request("b")])):
                with pytest.raises(EngineDeadError, match="the scripted executor is broken") as caught:
                    use()
                assert "scripted failure of step 1" in chain(caught.value)
        assert len(front.deaths) == 1

    def test_a_front_that_raises_is_a_death_and_no_silence(self, process):
        front = Front(process)

        def fall(output):
            raise KeyError("the front lost its list")

        front.client.start(fall, front._on_death)
        front.client.add([request()])
        front.wait(lambda: front.deaths)
        assert "the front lost its list" in chain(front.deaths[0])
        with pytest.raises(EngineDeadError):
            front.client.add([request("b")])
        front.client.shutdown()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@BOTH
def test_an_idle_engine_costs_no_cpu(process):
    with Front(process) as front:
        front.client.add([request()])
        front.wait(lambda: front.finished)
        pids = {os.getpid(), getattr(front.client, "pid", os.getpid())}
        time.sleep(0.1)
        before = sum(cpu_seconds(pid) for pid in pids)
        time.sleep(1.0)
        assert sum(cpu_seconds(pid) for pid in pids) - before < 0.05


# ── the child process ───────────────────────────────────────────────────────────────────────────────────────────


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_child_is_noticed_within_a_second():
    with Front("subprocess", delay_s=0.05) as front:
        front.client.add([request(max_tokens=200)])
        front.wait(lambda: front.outputs)
        pid = front.client.pid
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        front.wait(lambda: front.deaths, timeout=1.0)
        assert time.monotonic() - began < 1.0
        assert str(front.deaths[0]) == f"the engine process (pid {pid}) was killed by signal 9 without a word"
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            front.client.add([request("b")])


def test_a_call_that_waits_fails_when_the_child_dies():
    with Front("subprocess") as front:
        os.kill(front.client.pid, signal.SIGSTOP)  # it will not answer
        failures = []

        def ask():
            try:
                front.client.control("echo")
            except EngineDeadError as error:
                failures.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.1)
        os.kill(front.client.pid, signal.SIGKILL)
        thread.join(2.0)
        assert "killed by signal 9" in str(failures[0])


def test_shutdown_ends_the_child_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    front = Front("subprocess")
    front.start()
    pid = front.client.pid
    [folder] = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    front.client.shutdown()
    assert not alive(pid)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_directory_with_a_long_name_is_no_obstacle(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Front("subprocess") as front:
        assert front.client.control("echo", word="hello") == {"word": "hello"}
        assert list(long.iterdir()) == []


def test_starting_and_stopping_leaks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def cycle(**options):
        front = Front("subprocess", **options)
        try:
            front.start()
        except RuntimeError:
            assert options
        pid = front.client.pid
        front.client.shutdown()
        return pid

    def held():
        return set(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}

    cycle()
    before = held()
    pids = [cycle() for _ in range(8)] + [cycle(start_error="no") for _ in range(2)]
    assert held() == before
    assert not any(alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


def test_inline_starting_and_stopping_leaves_no_thread():
    before = set(threading.enumerate())
    for _ in range(10):
        front = Front("inline", delay_s=0.001)
        front.start()
        front.client.add([request()])
        front.client.shutdown()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(how, tmp_path):
    script = f"""
        import time
        from interlace.engine.subprocess_client import SubprocessClient
        from interlace.testing.executor import scripted_spec
        client = SubprocessClient(scripted_spec({FCFS!r}, delay_s=60.0))
        client.start(print, print)
        print(client.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(how)
        parent.wait(10)
        deadline = time.monotonic() + 5.0
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(pid)
        assert list(tmp_path.iterdir()) == [], "the child cleared away what its parent could not"
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_child_leaves_the_signals_of_its_group_to_the_front(how):
    with Front("subprocess", delay_s=0.01) as front:
        front.client.add([request(max_tokens=10)])
        os.kill(front.client.pid, how)
        front.wait(lambda: front.finished)
        assert front.finished["a"].reason == "length"
