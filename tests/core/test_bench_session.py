"""A measuring session over a scripted engine, and what it knows of the machine."""

import os
import subprocess
import sys

import pytest

from interlace.bench import machine
from interlace.bench.session import Recorder, Session
from interlace.bench.workloads import WorkItem
from interlace.clock import MonotonicClock
from interlace.engine.front import Front
from interlace.errors import InterlaceError, RequestFailedError
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly, front_spec


class Engine(ScriptedClient):
    """Answers with token 7, as often as was asked; the prompt [33] fails, [44] comes one token short."""

    def __init__(self):
        super().__init__(self.answer, clock=MonotonicClock())

    def answer(self, request):
        return [7] * (request.params.max_tokens - (request.prompt_token_ids == [44]))

    def add(self, requests):
        super().add(requests)
        for request in requests:
            if request.prompt_token_ids == [33]:
                self.fail(request.id, "no room")


@pytest.fixture
def open_session(monkeypatch):
    opened = []

    def open_with(**options):
        client = Engine()

        def open_front(loaded, plugins, clock):
            spec = front_spec(257, max_model_len=400)
            return Front(fake_assembly(client, spec=spec, clock=clock, subscribers=tuple(plugins)))

        monkeypatch.setattr(Front, "open", open_front)
        opened.append(Session(None, **options))
        return opened[-1], client

    yield open_with
    for session in opened:
        session.close()


def test_every_token_of_every_request_gets_a_time(open_session):
    session, client = open_session()
    run = session.run([WorkItem([1, 2, 3], 5), WorkItem([4], 2)])
    assert [len(timeline.tokens) for timeline in run.timelines] == [5, 2]
    assert [timeline.num_prompt_tokens for timeline in run.timelines] == [3, 1]
    for timeline in run.timelines:
        assert run.started <= timeline.arrival <= timeline.tokens[0]
        assert timeline.tokens == sorted(timeline.tokens)
    assert ("reset_prefix_cache", {}) in client.operations


def test_requests_are_greedy_and_of_exact_length(open_session):
    session, client = open_session(detokenize=False)
    session.run([WorkItem([1], 3)])
    params = client.added[-1].params
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.detokenize) == (0.0, 3, True, False)


def test_a_warm_up_gives_short_answers(open_session):
    session, client = open_session()
    session.warm_up([WorkItem([1], 100), WorkItem([2], 3)])
    assert [request.params.max_tokens for request in client.added[-2:]] == [8, 3]
    before = len(client.added)
    session.warm_up([])
    assert len(client.added) == before


def test_the_start_is_split(open_session):
    session, client = open_session()
    start = session.startup
    assert start.weights_s == 0.2 and start.cache_s == 0.0 and start.first_token_s >= 0
    assert start.total_s >= start.python_s + start.first_token_s
    assert len(client.added[0].prompt_token_ids) == 32 and client.added[0].params.max_tokens == 1


def test_a_failed_request_ends_the_benchmark(open_session):
    session, _ = open_session()
    with pytest.raises(RequestFailedError, match="failed: no room"):
        session.run([WorkItem([1], 2), WorkItem([33], 2)])


def test_missing_tokens_are_an_error_and_no_figure(open_session):
    session, _ = open_session()
    with pytest.raises(InterlaceError, match="gave 4 tokens instead of 5"):
        session.run([WorkItem([1], 5), WorkItem([44], 5)])


def test_an_interrupted_run_is_aborted(open_session, monkeypatch):
    session, client = open_session()
    client._pause = 0.01

    def interrupt(recorder, requests):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.run([WorkItem([1], 300), WorkItem([2], 300)])
    assert len(client.aborted) == 2


# ── machine ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_machine_is_described():
    found = machine.inspect_machine()
    assert found.cores >= 1 and set(found.versions) >= {"interlace", "python", "torch", "transformers"}
    assert machine.Machine(cpu=None, cores=2, load=1.5, system="x", versions={}).is_busy
    assert not machine.Machine(cpu=None, cores=2, load=0.5, system="x", versions={}).is_busy


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_children_counts():
    alone = machine.peak_memory()
    block = "x = bytearray(64 << 20); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", block], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        child.stdout.readline()
        assert machine.peak_memory() >= alone + (64 << 20)
        child.communicate(b"\n")
    assert machine.peak_memory() < alone + (64 << 20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_age_of_a_process():
    code = (
        "import time; t = time.monotonic(); from interlace.bench.machine import process_age; time.sleep(0.2); "
        "assert 0.2 <= process_age() + 0.02, process_age(); assert process_age() < time.monotonic() - t + 20"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_proc_only_this_process_is_known(monkeypatch):
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.process_age() is None
    assert machine.peak_memory() > 1 << 20
    assert os.getpid() not in machine._descendants(os.getpid())
