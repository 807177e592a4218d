"""The suite for executors notices what does not start, does not stop, or stays behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from multiprocessing import shared_memory
from typing import Any

import pytest

from interlace.plugins.executors.uniprocess import UniprocessExecutor


class HidesTheCause(UniprocessExecutor):
    def start(self, spec, on_event):
        try:
            return super().start(spec, on_event)
        except Exception:
            pass
        raise RuntimeError("start failed")


class HangsOnAFailedStart(UniprocessExecutor):
    def start(self, spec, on_event):
        try:
            return super().start(spec, on_event)
        except Exception:
            threading.Event().wait()


class StopsOnlyWhatStarted(UniprocessExecutor):
    helper = None

    def start(self, spec, on_event):
        self.helper = threading.Event()
        threading.Thread(target=self.helper.wait, args=(10,), name="helper").start()
        info = super().start(spec, on_event)
        self.started = True
        return info

    def shutdown(self):
        if getattr(self, "started", False):
            self.helper.set()
        super().shutdown()


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        (HidesTheCause, "start: the cause 'broken on purpose' is neither in"),
        (HangsOnAFailedStart, "no hanging: a start that fails has not ended after 1 s"),
        (StopsOnlyWhatStarted, "nothing left behind: after a failed start and shutdown there is thread 'helper'"),
    ],
)
def test_failed_starts(complaint, executor, text):
    assert text in complaint(executor, "a_failed_start_says_why", timeout_s=1.0, patience_s=0.2)


class OnceOnly(UniprocessExecutor):
    def shutdown(self):
        self._worker.shutdown()
        self._worker = None


class GoesOn(UniprocessExecutor):
    def shutdown(self):
        pass


@pytest.mark.parametrize(
    ("executor", "text"),
    [
        (OnceOnly, "AttributeError"),
        (GoesOn, "afterwards succeeds"),
    ],
)
def test_bad_ends(complaint, executor, text):
    assert text in complaint(executor, "shutdown", timeout_s=1.0)


class SharesItsWorker(UniprocessExecutor):
    workers: list[Any] = []  # noqa: RUF012

    def start(self, spec, on_event):
        info = super().start(spec, on_event)
        self.workers.append(self._worker)
        return info

    def submit(self, plan):
        self._worker = self.workers[0]
        return super().submit(plan)


def test_two_engines_that_share(complaint):
    assert complaint(SharesItsWorker, "one_after_another_and_two_at_once")


class Leaks(UniprocessExecutor):
    """Subclasses take something and keep it. The test gives it back."""

    taken: list[Any]

    def start(self, spec, on_event):
        self.taken.append(self.take())
        return super().start(spec, on_event)


class LeaksProcess(Leaks):
    def take(self):
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    @staticmethod
    def give_back(process):
        process.communicate()


class LeaksZombie(LeaksProcess):
    def shutdown(self):
        for process in self.taken:
            if process.stdin:
                process.stdin.close()
        super().shutdown()

    @staticmethod
    def give_back(process):
        process.wait()


class LeaksThread(Leaks):
    def take(self):
        event = threading.Event()
        threading.Thread(target=event.wait, name="forgotten").start()
        return event

    @staticmethod
    def give_back(event):
        event.set()


class LeaksFile(Leaks):
    def take(self):
        return open(__file__)

    @staticmethod
    def give_back(file):
        file.close()


class LeaksSharedMemory(Leaks):
    def take(self):
        return shared_memory.SharedMemory(create=True, size=64)

    def shutdown(self):
        for memory in self.taken:
            memory.close()
        super().shutdown()

    @staticmethod
    def give_back(memory):
        memory.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
@pytest.mark.parametrize(
    ("executor", "text"),
    [
        (LeaksProcess, "process "),
        (LeaksZombie, "which has ended and was never waited for"),
        (LeaksThread, "thread 'forgotten'"),
        (LeaksFile, "test_executor_conformance_stopping.py"),
        (LeaksSharedMemory, "shared memory /dev/shm/"),
    ],
)
def test_leaks(complaint, executor, text):
    taken = []
    leaking = type(executor.__name__, (executor,), {"taken": taken})
    try:
        found = complaint(leaking, "leaves_nothing_behind", patience_s=0.2)
    finally:
        for thing in taken:
            executor.give_back(thing)
    assert "nothing left behind: after shutdown there is " in found and text in found
