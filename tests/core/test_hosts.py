"""Engines that run elsewhere: the seam, with a host of a third party whose engines are real processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import psutil
import pytest

from interlace import LLM, SamplingParams
from interlace.assemble import assemble, make_client
from interlace.clock import MonotonicClock
from interlace.config import load_settings
from interlace.errors import ConfigError, EngineDeadError, InterlaceError, PluginError, PluginImportError
from interlace.messages import EngineRequest
from interlace.plugin_manager import PluginManager
from interlace.testing.checked_worker import generate_alone
from interlace.testing.executor import ScriptedExecutor, scripted_spec

FCFS = "interlace.plugins.schedulers.fcfs:Fcfs"
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def hosted(install):
    install("hosted")


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def make(**more):
        given = {"model": str(tmp_path), "checkpoint.use": "dummy", "device": "cpu", "executor.use": "hosted"}
        options = {"executor.options.hosted.vocab_size": 260, "executor.options.hosted.num_blocks": 32}
        return {**given, **options, "cache.block_size": 4, **{key.replace("__", "."): more[key] for key in more}}

    return make


def request(id="a", max_tokens=5, **fields) -> EngineRequest:
    values = {"prompt_token_ids": [1, 2, 3], "arrival_time": time.monotonic(), "seed": 0} | fields
    return EngineRequest(id=id, params=SamplingParams(max_tokens=max_tokens), **values)


class Hosted:
    """A client of an engine elsewhere, and what it said."""

    def __init__(self, step_timeout_s=60.0, **options):
        spec = scripted_spec(FCFS, executor="interlace_hosted_executor:HostedExecutor", **options)
        executor = msgspec.structs.replace(spec.executor, host="interlace_hosted_host:make_host")
        self.spec = msgspec.structs.replace(spec, executor=executor, step_timeout_s=step_timeout_s)
        self.host = self.spec.executor.make_host()
        self.client = make_client(self.spec, "subprocess", MonotonicClock(), self.host)
        self.link = self.host.links[0]
        self.outputs, self.deaths = [], []
        self.changed = threading.Condition()

    def _note(self, notes, note):
        with self.changed:
            notes.append(note)
            self.changed.notify_all()

    def start(self):
        return self.client.start(
            lambda output: self._note(self.outputs, output), lambda death: self._note(self.deaths, death)
        )

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.client.shutdown()

    def until(self, condition, timeout=20.0):
        with self.changed:
            assert self.changed.wait_for(condition, timeout), (self.outputs, self.deaths)

    @property
    def finished(self):
        return {name: info for output in self.outputs for name, info in output.finished.items()}


# ── one engine ────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_answers_and_logs_through_its_front(caplog):
    caplog.set_level(logging.INFO, "interlace")
    with Hosted() as hosted:
        hosted.client.add([request()])
        hosted.until(lambda: hosted.finished)
        tokens = [token for output in hosted.outputs for token in output.token_ids]
        assert tokens == generate_alone(request(), ScriptedExecutor(ScriptedExecutor.Options()).next_token, 256)[0]
        assert hosted.client.control("process_id") == hosted.client.pid == hosted.link.process.pid
        assert hosted.client.health().status == "ok"
        process = hosted.link.process
    assert process.returncode == 0 and hosted.link.done == ["close"], "it ended by itself"
    said = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("interlace.hosted", f"(engine on node far) pid {process.pid} starts with 3 threads") in said, "as settled"
    assert ("interlace.engine", f"engine on node far has started (pid {process.pid})") in said


def test_times_are_those_of_the_front():
    """The engine's machine counts from another zero: it is ahead of the front by 5000 s, as the host found out."""
    with Hosted(clock_offset=-5000.0) as hosted:
        before = time.monotonic()
        hosted.client.add([request(deadline=before + 60.0)])
        hosted.until(lambda: hosted.finished)
        moments = [output.now + 5000.0 for output in hosted.outputs]
        assert before <= moments[0] <= moments[-1] <= time.monotonic()


def test_a_start_that_fails_says_where():
    hosted = Hosted(start_error="no memory")
    with pytest.raises(RuntimeError, match=r"^no memory \(said on node far\)$") as caught:
        hosted.start()
    assert "interlace_hosted_executor" in str(caught.value.__cause__), "the engine's own traceback"
    assert hosted.link.process.returncode is not None and hosted.link.done[-1] == "close"


def test_a_link_that_cannot_start():
    hosted = Hosted(refuse="tomorrow")
    with pytest.raises(InterlaceError, match="no room: tomorrow"):
        hosted.start()
    assert hosted.link.done == ["close"]
    hosted.client.shutdown()


def test_a_shutdown_ends_a_start_that_waits():
    hosted = Hosted(refuse="wait")
    failures = []

    def start():
        try:
            hosted.start()
        except InterlaceError as error:
            failures.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while not hosted.link.done:
        time.sleep(0.005)
    hosted.client.shutdown()
    thread.join(20)
    assert len(failures) == 1


def test_a_killed_engine_has_an_obituary():
    with Hosted(delay_s=0.05) as hosted:
        hosted.client.add([request(max_tokens=200)])
        hosted.until(lambda: hosted.outputs)
        pid = hosted.client.pid
        os.kill(pid, signal.SIGKILL)
        hosted.until(lambda: hosted.deaths)
        assert str(hosted.deaths[0]) == f"the engine process (pid {pid} on node far) has left for good"
        with pytest.raises(EngineDeadError, match="has left for good"):
            hosted.client.add([request("b")])


def test_a_frozen_engine_is_asked_what_it_does_and_then_killed():
    with Hosted(step_timeout_s=0.3) as hosted:
        os.kill(hosted.client.pid, signal.SIGSTOP)
        hosted.until(lambda: hosted.deaths)
        assert hosted.link.done[:2] == ["interrupt", "kill"]
        assert "it answered nothing for 0.3 s (engine.step_timeout_s) and was ended" in str(hosted.deaths[0])


def test_an_engine_ends_when_its_front_has_gone():
    with Hosted() as hosted:
        engine = psutil.Process(hosted.client.pid)
        hosted.link.socket.shutdown(2)  # as the kernel does for a front that is killed
        engine.wait(20)


# ── chosen by the configuration ───────────────────────────────────────────────────────────────────────────────


def test_found_by_its_provider(settings):
    loaded = load_settings(settings(), env={})
    offer = PluginManager(loaded.settings).registry("executors").get("hosted")
    assert offer.provider.host == offer.component().host == "interlace_hosted_host:make_host"


@pytest.mark.parametrize("replicas", [1, 2])
def test_llm_with_its_engines_elsewhere(settings, replicas, caplog):
    caplog.set_level(logging.INFO, "interlace")
    with LLM(**nested(settings(engine__replicas=replicas))) as llm:
        (answer,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True, seed=1))
        assert len(answer.outputs[0].token_ids) == 4
        pids = llm.front.control("process_id")
    children = psutil.Process().children()
    assert not any(child.pid in (pids if replicas > 1 else [pids]) for child in children)
    lines = [record.getMessage() for record in caplog.records]
    if replicas > 1:
        assert any(line.startswith("replicas: 2 engines, at the other end of a socket pair; router ") for line in lines)
        assert any(line.startswith("(engine 1 on node far) pid ") for line in lines)


def test_a_replica_elsewhere_that_dies_comes_back(settings):
    with LLM(**nested(settings(engine__replicas=2, router__use="round_robin"))) as llm:
        first = llm.front.control("process_id")
        os.kill(first[1], signal.SIGKILL)
        for _ in range(400):
            health = llm.front.health()
            if health.restarts and health.status == "ok":
                break
            time.sleep(0.05)
        assert health.status == "ok" and health.replicas[1].restarts == 1
        assert health.last_cause.startswith(f"replica 1: the engine process (pid {first[1]} on node far) has left")
        second = llm.front.control("process_id")
        assert second[0] == first[0] and second[1] != first[1]
        answers = llm.generate([[5, 6, 7], [7, 8]], SamplingParams(max_tokens=4, ignore_eos=True))
        assert [len(answer.outputs[0].token_ids) for answer in answers] == [4, 4]


def test_a_program_may_end_without_a_shutdown(settings, install):
    """Even where there are several, all are ended, and nothing is said about it."""
    given = nested(settings(engine__replicas=2))
    script = f"from interlace import LLM\nllm = LLM(**{given!r})\nprint(*llm.front.control('process_id'))"
    environment = os.environ | {"PYTHONPATH": install("hosted")[0]}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not any(psutil.pid_exists(int(pid)) for pid in done.stdout.split())


def nested(flat):
    """Dotted keys as `LLM` takes them."""
    tables = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return tables


def test_an_executor_may_leave_its_core_at_home(settings):
    given = settings(executor__options__hosted__elsewhere=False, engine__process="inline")
    with LLM(**nested(given)) as llm:
        assert llm.front.control("process_id") == os.getpid()


def test_the_front_needs_no_gpu_for_engines_that_have(settings, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = load_settings({**settings(), "device": "cuda:0"}, env={})
    assert assemble(loaded).spec.device == "cuda:0"
    loaded = load_settings({**settings(executor__options__hosted__elsewhere=False), "device": "cuda:0"}, env={})
    with pytest.raises(ConfigError, match="0 CUDA devices here"):
        assemble(loaded)


def test_it_cannot_be_a_thread_of_the_front(settings):
    loaded = load_settings(settings(engine__process="inline"), env={})
    with pytest.raises(
        ConfigError,
        match=r"executor 'hosted' \(interlace-hosted 0\.2\) put the engine at the other end of a socket pair, but "
        r"engine\.process = 'inline' \(constructor\)",
    ):
        assemble(loaded)


def test_a_host_that_cannot_be_made_is_named(settings):
    loaded = load_settings(settings(executor__options__hosted__refuse="host"), env={})
    with pytest.raises(PluginError, match=r"executor 'hosted' \(.*\) cannot be set up: OSError: no hosts today"):
        assemble(loaded)
    loaded = load_settings({**settings(), "executor.use": "homeless"}, env={})
    with pytest.raises(
        PluginImportError, match=r"the host of executor 'homeless' .* cannot be imported from 'nowhere:"
    ):
        assemble(loaded)
