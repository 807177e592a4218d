"""A child that is gone before, or while, somebody speaks to it: whoever speaks is told, and never waits for it."""

import os
import signal
import sys
import threading

import pytest

from interlace.assemble import make_client
from interlace.clock import MonotonicClock
from interlace.errors import EngineDeadError
from interlace.messages import EngineRequest, SamplingParams
from interlace.testing.executor import scripted_spec
from interlace.testing.time_limit import time_limit

FCFS = "interlace.plugins.schedulers.fcfs:Fcfs"


def test_speaking_to_a_child_that_was_just_killed():
    """Between its death and its client's hearing of it there is a moment in which nobody listens."""
    client = make_client(scripted_spec(FCFS), "subprocess", MonotonicClock())
    told = threading.Event()
    client.start(lambda output: None, lambda error: told.set())
    request = EngineRequest(id="a", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), arrival_time=0.0, seed=0)
    os.kill(client.pid, signal.SIGKILL)
    with time_limit(30, "adding"), pytest.raises(EngineDeadError):
        while True:
            client.add([request])
    assert told.wait(30)
    client.shutdown()


def test_a_child_that_ends_before_it_listens(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    client = make_client(scripted_spec(FCFS), "subprocess", MonotonicClock())
    with time_limit(30, "starting"), pytest.raises(EngineDeadError, match="ended with status 3 without a word"):
        client.start(lambda output: None, lambda error: None)
