"""`LauncherProcess`: the executor's end of the launcher, the child process that speaks to Ray."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from interlace.errors import InterlaceError
from interlace.plugins.executors.cluster.messages import FromLauncher, ToLauncher, decode_from_launcher, encode
from interlace.plugins.executors.processes.channel import MessageReader, frame

STOP_TIMEOUT = 6.0
"""Seconds it is given to end everything before it is killed; with it goes what it has started."""
_LONGEST_FOLDER = 40
"""Ray has sockets below it, whose names are limited to about 107 characters."""
_MOST_OUTPUT = 4000


class LauncherProcess:
    """Started at once. `send` and `read` speak to it; `stop` ends it, and everything it has started."""

    def __init__(self, own_cluster: bool) -> None:
        """`own_cluster`: it is to start one, in `folder`."""
        self.folder = _session_folder() if own_cluster else ""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (what Ray prints; shown only if nothing else is said)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", f"{__package__}.launcher", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                # Unless told not to, Ray tells its makers of every cluster that is started.
                ["env", "RAY_USAGE_STATS_ENABLED=0", *command],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the front's to handle
            )
        self._socket = ours
        self._reader = MessageReader(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """To be waited on until there is something to `read`."""
        return self._socket.fileno()

    def send(self, message: ToLauncher) -> None:
        """If it is gone nobody hears it; `read` tells."""
        with contextlib.suppress(OSError):
            self._socket.sendall(frame(encode(message)))

    def read(self) -> list[FromLauncher]:
        """What it says; blocks if there is nothing. Raises `InterlaceError` when it is gone, with what was printed."""
        try:
            return [decode_from_launcher(message) for message in self._reader.read()]
        except (EOFError, ConnectionError):
            self._kill()
            code = self._process.wait()
            size = os.fstat(self._output.fileno()).st_size
            printed = os.pread(self._output.fileno(), _MOST_OUTPUT, max(0, size - _MOST_OUTPUT))
            raise InterlaceError(
                f"the process that speaks to Ray (pid {self._process.pid}) ended with status {code}. It printed:\n"
                f"{printed.decode('utf-8', 'replace').strip() or 'nothing'}"
            ) from None

    def stop(self) -> None:
        """End it, and free everything. Once only."""
        self._socket.shutdown(socket.SHUT_RDWR)  # also for the thread that reads
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT)
        self._kill()
        self._process.wait()

    def release(self) -> None:
        """Close what `stop` leaves open for a thread that may still read."""
        self._socket.close()
        self._output.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        """Its children in the cluster are killed by the kernel when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _session_folder() -> str:
    """A new directory that only this user can enter."""
    folder = tempfile.mkdtemp(prefix="interlace-ray-")
    if len(folder) > _LONGEST_FOLDER:
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="interlace-ray-", dir="/tmp")
    return folder
