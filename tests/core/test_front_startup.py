"""Starting an engine: the bar, and an interrupted start."""

import threading

import pytest

from interlace.clock import VirtualClock
from interlace.engine.front import Front
from interlace.engine.inline_client import InlineClient
from interlace.engine.startup import StartupProgress
from interlace.interfaces.executor import ExecutorEvent
from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import fake_assembly


def progress(done):
    return ExecutorEvent("progress", "loading weights", {"done": done, "total": 4})


class Reporting(ScriptedClient):
    """Tells of its progress while it starts, and of something else."""

    def start(self, on_output, on_death, on_event=None):
        for done in range(5):
            on_event(progress(done))
        on_event(ExecutorEvent("worker_died", "worker 1 is gone"))
        return super().start(on_output, on_death)


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = StartupProgress()
    with bar:
        bar.show(progress(4))
    bar.show(progress(4))  # late: nobody looks any more
    out, err = capsys.readouterr()
    assert out == "" and "Loading weights" in err and "100%" in err


def test_progress_is_silent_elsewhere_and_other_events_are_logged(capsys, caplog):
    front = Front(fake_assembly(Reporting(lambda request: [])))
    front.shutdown()
    assert capsys.readouterr() == ("", "")
    assert "worker 1 is gone" in caplog.text and "loading weights" not in caplog.text


def test_shutdown_during_the_start_does_not_wait_for_ever():
    loading, go_on = threading.Event(), threading.Event()
    stopped = []

    class FakeExecutor:
        def check_health(self):
            pass

        def shutdown(self):
            stopped.append(True)

    class IdleCore:
        has_runnable = False
        max_in_flight = 1

        def next_wakeup(self):
            return None

        def pending_output(self, now):
            return None

        def plan(self, now):
            return None

    def start_executor(on_event):
        loading.set()
        assert go_on.wait(10)
        return FakeExecutor(), None

    client = InlineClient(start_executor, lambda info: IdleCore(), VirtualClock())
    starter = threading.Thread(target=lambda: client.start(lambda output: None, lambda error: None), daemon=True)
    starter.start()
    assert loading.wait(10)
    closer = threading.Thread(target=client.shutdown, daemon=True)
    closer.start()
    closer.join(0.05)
    go_on.set()
    closer.join(10)
    starter.join(10)
    assert not closer.is_alive() and not starter.is_alive() and stopped == [True]


def test_ctrl_c_while_starting_shuts_the_client_down():
    class Interrupted(ScriptedClient):
        def start(self, on_output, on_death, on_event=None):
            raise KeyboardInterrupt

    client = Interrupted(lambda request: [])
    with pytest.raises(KeyboardInterrupt):
        Front(fake_assembly(client))
    assert client._stopped
